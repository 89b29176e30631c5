"""LoRA files written by diffusers, peft and kohya: reading them."""

import peft
import pytest
import safetensors.torch
import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from loca_vision.formats.conversion.merge_checkpoint import merge
from loca_vision.formats.conversion.weight_deltas import read_source
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.reader import read_lora
from loca_vision.formats.lora_files.writer import write_peft_lora
from support.lora_files import COMPONENTS, MIXED, equal, plain
from support.pipelines import stable_diffusion, stable_diffusion_xl
from support.timm_models import tiny


def adapted(pipe, **settings):
    for component, targets in COMPONENTS.items():
        if getattr(pipe, component, None) is not None:
            fitting = {k: patterns_for(component, v) if isinstance(v, dict) else v for k, v in settings.items()}
            getattr(pipe, component).add_adapter(LoraConfig(target_modules=targets, **fitting))
    layers = {f"{c}.{p}": m for c in COMPONENTS for p, m in getattr(pipe, c, torch.nn.Identity()).named_modules()}
    layers = {path: m for path, m in layers.items() if isinstance(m, peft.tuners.lora.LoraLayer)}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    return {path: layer.get_delta_weight("default").detach() for path, layer in layers.items()}


def patterns_for(component, patterns):
    """Those that name a layer there: others make peft warn."""
    endings = {"unet": ("to_q", "to_k", "to_v"), "text_encoder": ("q_proj",), "text_encoder_2": ("fc1",)}
    return {name: value for name, value in patterns.items() if name.endswith(endings[component])}


def save(pipe, folder, *, about=True, as_kohya=False):
    states = {c: get_peft_model_state_dict(getattr(pipe, c)) for c in COMPONENTS if getattr(pipe, c, None) is not None}
    if as_kohya:
        together = {f"{c}.{key}": value.contiguous() for c, state in states.items() for key, value in state.items()}
        folder.mkdir()
        return safetensors.torch.save_file(convert_state_dict_to_kohya(together), folder / "kohya.safetensors")
    configs = {c: getattr(pipe, c).peft_config["default"].to_dict() for c in states}
    return type(pipe).save_lora_weights(
        folder,
        **{"unet_lora_layers" if c == "unet" else f"{c}_lora_layers": state for c, state in states.items()},
        **{f"{c}_lora_adapter_metadata": config for c, config in configs.items() if about},
    )


def check_deltas(read, deltas, **tolerance):
    assert {plain(path) for path in read} == {plain(path) for path in deltas}
    expected = {plain(path): delta for path, delta in deltas.items()}
    for path, pair in read.items():
        assert torch.allclose(pair.delta(), expected[plain(path)], atol=1e-5), path


SETTINGS = [
    {"r": 4, "lora_alpha": 4},
    {"r": 4, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 2, "use_rslora": True},
    {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"to_q": 2, "attn2.to_k": 3},
        "alpha_pattern": {"q_proj": 7, "to_v": 1, "fc1": 3},
    },
]


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
@pytest.mark.parametrize("settings", SETTINGS, ids=["plain", "alpha", "stabilised", "patterns"])
def test_what_diffusers_saves_is_read(settings, make, tmp_path):
    pipe = make()
    deltas = adapted(pipe, **settings)
    save(pipe, tmp_path / "lora")
    check_deltas(read_lora(tmp_path / "lora").pairs, deltas)


def test_without_a_header_alpha_is_the_rank(tmp_path):
    pipe = stable_diffusion()
    deltas = adapted(pipe, r=3, lora_alpha=3)
    save(pipe, tmp_path / "lora", about=False)
    check_deltas(read_lora(tmp_path / "lora").pairs, deltas)


def test_what_diffusers_converts_to_kohya_is_read(tmp_path):
    pipe = stable_diffusion_xl()
    deltas = adapted(pipe, r=4, lora_alpha=4)
    save(pipe, tmp_path / "lora", as_kohya=True)
    check_deltas(read_lora(tmp_path / "lora").pairs, deltas)


@pytest.mark.parametrize(
    "settings", [*SETTINGS[:3], {"r": 4, "rank_pattern": {"blocks.1.attn.qkv": 2}, "alpha_pattern": {"fc1": 5}}]
)
def test_what_peft_saves_of_a_timm_model_is_read(settings, tmp_path):
    model = get_peft_model(tiny("vit"), LoraConfig(target_modules=["qkv", "fc1"], modules_to_save=["head"], **settings))
    layers = {p: m for p, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    head = model.base_model.model.head.modules_to_save["default"]
    torch.nn.init.normal_(head.weight)
    model.save_pretrained(tmp_path)
    found = read_lora(tmp_path)
    deltas = {path.removeprefix("base_model.model."): m.get_delta_weight("default").detach() for path, m in layers.items()}
    check_deltas(found.pairs, deltas)
    assert found.whole.keys() == {"head.weight", "head.bias"} and torch.equal(found.whole["head.weight"], head.weight)


@pytest.mark.parametrize("about", [{}, MIXED], ids=["plain", "mixed"])
def test_peft_takes_what_is_written(about, tmp_path, images):
    base = tiny("vit")
    ranks, scales = about.get("ranks", (4,)), about.get("scales", (1.0,))
    pairs = {
        name: LowRankPair(torch.randn(r, 48), torch.randn(144, r), s)
        for name, r, s in zip(("blocks.0.attn.qkv", "blocks.1.attn.qkv"), ranks * 2, scales * 2, strict=False)
    }
    whole = {"head.weight": torch.randn(3, 48), "head.bias": torch.randn(3)}
    write_peft_lora(tmp_path / "lora", pairs, whole=whole)
    loaded = PeftModel.from_pretrained(tiny("vit"), str(tmp_path / "lora")).eval()
    with torch.no_grad():
        for name, pair in pairs.items():
            base.get_submodule(name).weight += pair.delta()
        base.head.weight.copy_(whole["head.weight"])
        base.head.bias.copy_(whole["head.bias"])
        assert torch.allclose(loaded(images), base(images), rtol=1e-4, atol=1e-3)
    found = read_lora(tmp_path / "lora")
    equal(found.pairs, pairs, atol=1e-6)
    assert all(torch.equal(found.whole[name], tensor) for name, tensor in whole.items())


def test_a_folder_of_others_is_not_overwritten(tmp_path):
    pairs = {"a": LowRankPair(torch.ones(1, 2), torch.ones(2, 1))}
    write_peft_lora(tmp_path / "lora", pairs)
    with pytest.raises(FileExistsError, match="not empty"):
        write_peft_lora(tmp_path / "lora", pairs)
    write_peft_lora(tmp_path / "lora", {"b": pairs["a"]}, overwrite=True)
    assert list(read_lora(tmp_path / "lora").pairs) == ["b"]
    (tmp_path / "lora" / "mine").touch()
    with pytest.raises(FileExistsError, match="mine is there"):
        write_peft_lora(tmp_path / "lora", pairs, overwrite=True)
    assert list(read_lora(tmp_path / "lora").pairs) == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize("about", [True, False], ids=["header", "plain"])
def test_dora_of_diffusers_is_merged_as_it_fuses(about, tmp_path):
    """In linear layers and in convolutions of two sizes."""
    pipe, fresh = stable_diffusion(), stable_diffusion()
    settings = LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=r".*(attn1.to_q|proj_in|resnets.0.conv1)$")
    pipe.unet.add_adapter(settings)
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    layers = get_peft_model_state_dict(pipe.unet)
    header = {"unet_lora_adapter_metadata": pipe.unet.peft_config["default"].to_dict()} if about else {}
    type(pipe).save_lora_weights(tmp_path / "lora", unet_lora_layers=layers, **header)
    safetensors.torch.save_file(fresh.unet.state_dict(), tmp_path / "base.safetensors")
    source = read_source(tmp_path / "lora")
    assert len(source.needs_weight) == len(source.shapes) > 5 and set(source.kernels.values()) == {(1, 1), (3, 3)}
    merged = safetensors.torch.load_file(merge(tmp_path / "base.safetensors", source, tmp_path / "out.safetensors"))
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.allclose(merged[name], tensor, atol=1e-5), name
