"""LoRA files of others, read and written: what peft and diffusers do with them is the measure."""

import json
import random
import re

import peft
import pytest
import safetensors.torch
import torch
from conftest import tiny
from diffusers import StableDiffusionPipeline
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import stable_diffusion, stable_diffusion_xl

from loca_vision.formats.lora_keys import flattened, parse_key, unflattened
from loca_vision.formats.lora_reader import read_lora
from loca_vision.formats.lora_writer import write_diffusers_lora, write_kohya_lora, write_peft_lora
from loca_vision.formats.low_rank_pair import LowRankPair

ATTENTION = r".*attn.*(to_q|to_k|to_v|to_out\.0)$"
COMPONENTS = {"unet": ATTENTION, "text_encoder": r".*self_attn\.(q_proj|out_proj)$", "text_encoder_2": r".*(v_proj|fc1)$"}


def plain(path):
    """A path in the model, which may have no `text_model` in it."""
    return path.replace(".text_model.", ".")


def modules(pipe):
    """Linear layers of the components by `component.path`."""
    for component in COMPONENTS:
        model = getattr(pipe, component, None)
        for path, module in model.named_modules() if model is not None else ():
            if isinstance(module, torch.nn.Linear):
                yield f"{component}.{path}", module


def made_up(pipe, *, ranks=(4,), scales=(1.0,), seed=0):
    """A pair for each attention layer of a pipeline, ranks and scales in turn."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for path, module in modules(pipe):
        component, _, rest = path.partition(".")
        if re.fullmatch(COMPONENTS[component], rest):
            rank, scale = ranks[len(pairs) % len(ranks)], scales[len(pairs) % len(scales)]
            down = torch.randn(rank, module.in_features, generator=generator)
            pairs[path] = LowRankPair(down, torch.randn(module.out_features, rank, generator=generator), scale)
    return pairs


def weights_of(pipe):
    return {path: module.weight.detach().clone() for path, module in modules(pipe)}


def check_merged(pipe, base, pairs):
    """Fused, every weight is W + delta, and all others are as they were."""
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = weights_of(pipe)
    assert after.keys() == base.keys()
    for path, weight in base.items():
        delta = pairs[path].delta() if path in pairs else torch.zeros(())
        assert torch.allclose(after[path], weight + delta, atol=2e-5), path


def equal(read, pairs, **tolerance):
    read = {path: pair for path, pair in read.items() if pair.up.any()}  # one of zeros may be there for diffusers
    assert {plain(path) for path in read} == {plain(path) for path in pairs}
    expected = {plain(path): pair.delta() for path, pair in pairs.items()}
    assert all(torch.allclose(pair.delta(), expected[plain(path)], **tolerance) for path, pair in read.items())


MIXED = {"ranks": (4, 2, 3), "scales": (1.0, 0.25, 0.3)}


@pytest.mark.parametrize("make", [stable_diffusion, stable_diffusion_xl])
@pytest.mark.parametrize("about", [{}, {"scales": (0.25,)}, MIXED], ids=["plain", "scaled", "mixed"])
@pytest.mark.parametrize("write", [write_diffusers_lora, write_kohya_lora])
def test_a_pipeline_takes_what_is_written(write, about, make, tmp_path):
    pipe = make()
    pairs, base = made_up(pipe, **about), weights_of(pipe)
    file = write(tmp_path / "lora.safetensors", pairs)
    equal(read_lora(file).pairs, pairs, atol=1e-5)
    pipe.load_lora_weights(file)
    check_merged(pipe, base, pairs)


def test_a_folder_gets_the_usual_name(tmp_path):
    pairs = made_up(stable_diffusion())
    file = write_diffusers_lora(tmp_path / "lora", pairs)
    assert file == tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    equal(read_lora(tmp_path / "lora").pairs, pairs, atol=0)


def test_one_alpha_keeps_the_factors_to_the_bit(tmp_path):
    pairs = made_up(stable_diffusion(), scales=(0.3,))
    read = read_lora(write_kohya_lora(tmp_path / "x.safetensors", pairs)).pairs
    for path, pair in read.items():
        mine = next(p for name, p in pairs.items() if plain(name) == plain(path))
        assert torch.equal(pair.up, mine.up) and torch.equal(pair.down, mine.down) and pair.scale == pytest.approx(0.3)


@pytest.mark.parametrize(("scale", "dtype"), [(0.5, torch.float16), (0.3, torch.float32)])
def test_a_scale_that_half_precision_cannot_hold_widens_the_factor(scale, dtype, tmp_path):
    pair = LowRankPair(torch.randn(2, 4).half(), torch.randn(3, 2).half(), scale)
    (read,) = read_lora(write_diffusers_lora(tmp_path / "x.safetensors", {"unet.a.to_q": pair})).pairs.values()
    assert read.up.dtype == dtype and torch.allclose(read.delta(), pair.delta(), rtol=1e-6)


def test_half_precision_on_request(tmp_path):
    pairs = made_up(stable_diffusion())
    read = read_lora(write_kohya_lora(tmp_path / "x.safetensors", pairs, dtype=torch.float16)).pairs
    assert all(pair.up.dtype == pair.down.dtype == torch.float16 for pair in read.values())
    large = {"unet.mid_block.attentions.0.proj_in": LowRankPair(torch.ones(1, 2), torch.full((2, 1), 1e6))}
    with pytest.raises(ValueError, match=r"lora_up.weight is not finite in torch.float16"):
        write_kohya_lora(tmp_path / "x.safetensors", large, dtype=torch.float16)
    equal(read_lora(tmp_path / "x.safetensors").pairs, pairs, atol=0.05)


# What others write


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


# Names


def test_former_names_of_diffusers(tmp_path):
    """As `StableDiffusionPipeline` reads them: attention processors with layers of their own, and what came after."""
    generator = torch.Generator().manual_seed(0)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    names = {
        f"unet.{block}.attn1.processor.to_q_lora": f"unet.{block}.attn1.to_q",
        f"unet.{block}.attn1.processor.to_out_lora": f"unet.{block}.attn1.to_out.0",
        f"unet.{block}.attn2.to_v.lora": f"unet.{block}.attn2.to_v",
    }
    clip = "text_encoder.text_model.encoder.layers.0.self_attn"
    names |= {f"{clip}.to_k_lora": f"{clip}.k_proj", f"{clip}.to_out_lora": f"{clip}.out_proj"}
    pipe = stable_diffusion()
    sizes = {path: tuple(m.weight.shape) for path, m in modules(pipe)}
    tensors = {}
    for old, new in names.items():
        rows, cols = sizes[plain(new)]
        tensors[f"{old}.down.weight"] = torch.randn(2, cols, generator=generator)
        tensors[f"{old}.up.weight"] = torch.randn(rows, 2, generator=generator)
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    read = read_lora(tmp_path / "x.safetensors").pairs
    assert set(read) == set(names.values())
    base = weights_of(pipe)
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    check_merged(pipe, base, {plain(path): pair for path, pair in read.items()})


def test_names_between_the_former_and_the_present():
    clip = "text_encoder.text_model.encoder.layers.0"
    assert parse_key(f"{clip}.mlp.fc1.lora_linear_layer.down.weight").path == f"{clip}.mlp.fc1"
    assert parse_key(f"{clip}.self_attn.q_proj.lora_linear_layer.up.weight").role == "up"
    assert parse_key("text_encoder.encoder.layers.0.mlp.fc1.lora_A.weight").path == f"{clip}.mlp.fc1"
    assert parse_key("base_model.model.blocks.0.attn.qkv.lora_A.mine.weight").path == "blocks.0.attn.qkv"


def original_names():
    """kohya's names of the attention layers, and a few others, of SDXL's original UNet."""
    depth = {4: 2, 5: 2, 7: 3, 8: 3}
    for number, blocks in depth.items():
        for block in range(blocks):
            for rest in ("attn1_to_q", "attn2_to_k", "attn1_to_out_0", "ff_net_0_proj", "ff_net_2"):
                yield f"input_blocks_{number}_1_transformer_blocks_{block}_{rest}"
        yield from (f"input_blocks_{number}_1_proj_in", f"input_blocks_{number}_0_in_layers_2")
    for number in range(6):
        yield f"output_blocks_{number}_1_transformer_blocks_1_attn2_to_v"
        yield f"output_blocks_{number}_0_skip_connection"
        yield f"output_blocks_{number}_0_emb_layers_1"
    yield from ("middle_block_1_transformer_blocks_9_attn1_to_v", "middle_block_0_in_layers_2", "middle_block_2_out_layers_3")
    yield from ("input_blocks_3_0_op", "output_blocks_2_2_conv", "time_embed_0", "label_emb_0_2", "input_blocks_0_0", "out_2")


def test_names_of_the_original_unet_are_understood_as_diffusers_does(recwarn):
    class Settings:
        layers_per_block = 2

    for name in original_names():
        ends = ("lora_down.weight", "lora_up.weight")
        state = {f"lora_unet_{name}.{end}": torch.zeros(1) for end in ends}
        theirs, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(state, Settings))
        (path,) = {parse_key(key).path for key in theirs}
        assert f"unet.{unflattened(name)}" == path, name


def test_every_name_of_a_unet_has_its_dots_back():
    for pipe in (stable_diffusion(), stable_diffusion_xl()):
        for path, module in pipe.unet.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                assert unflattened(path.replace(".", "_")) == path
                assert parse_key(f"{flattened(f'unet.{path}', several_encoders=False)}.alpha").path == f"unet.{path}"


@pytest.mark.parametrize(
    "name", ["foo", "down_blocks_0_foo", "input_blocks_4", "input_blocks_4_7_x", "input_blocks_0_1_proj_in", "", "_", "to_q_"]
)
def test_unknown_names_stay_unknown(name):
    assert parse_key(f"lora_unet_{name}.lora_down.weight").role == "foreign"


# What is refused


def state_of(**more):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 4), f"{layer}.lora_B.weight": torch.ones(3, 2)}
    tensors |= {key.replace("LAYER", layer): value for key, value in more.items()}
    return {key: value for key, value in tensors.items() if value is not None}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"LAYER.lora_B.weight": None}, r"attn1.to_q.lora_A.weight: the up half of unet.*attn1.to_q is missing"),
        ({"LAYER.lora_A.weight": None}, r"attn1.to_q.lora_B.weight: the down half"),
        ({"other.alpha": torch.ones(())}, r"other.alpha: the down half of other is missing"),
        ({"LAYER.lora_B.weight": torch.ones(3, 3)}, r"lora_A.weight is \(2, 4\) and .*lora_B.weight \(3, 3\)"),
        ({"LAYER.lora_B.weight": torch.ones(3, 0)}, r"are wanted"),
        ({"LAYER.lora_B.weight": torch.ones(3, 2, 1)}, r"is wanted|are wanted|convolution"),
        ({"LAYER.lora_B.weight": torch.ones(3, 2, dtype=torch.int8)}, r"has dtype I8"),
        ({"LAYER.lora_B.weight": torch.full((3, 2), torch.nan)}, r"lora_B.weight holds NaN"),
        ({"LAYER.alpha": torch.tensor(torch.inf)}, r"alpha holds NaN or infinity"),
        ({"LAYER.alpha": torch.ones(2)}, r"one number is wanted"),
        ({"LAYER.lora.down.weight": torch.ones(2, 4)}, r"has that part twice, in .*lora.down.weight as well"),
        ({"LAYER.hada_w1_a": torch.ones(2)}, r"hada_w1_a: LoHa; only LoRA"),
        ({"LAYER.lokr_w1": torch.ones(2)}, r"lokr_w1: LoKr"),
        ({"LAYER.lora_magnitude_vector": torch.ones(2)}, r"lora_magnitude_vector: DoRA"),
        ({"LAYER.dora_scale": torch.ones(2)}, r"dora_scale: DoRA"),
        ({"LAYER.lora_B.bias": torch.ones(3)}, r"lora_B.bias: a bias"),
        ({"LAYER.diff": torch.ones(3)}, r"diff: the difference of a whole tensor"),
        ({"emb_params": torch.ones(3)}, r"emb_params: a textual inversion"),
        ({"lora_unet_foo.lora_down.weight": torch.ones(3)}, r"a name with its dots lost"),
        ({"unet.conv_in.weight": torch.ones(3)}, r"unet.conv_in.weight: no part of a LoRA"),
        ({".lora_A.weight": torch.ones(3)}, r"\.lora_A.weight: no part of a LoRA"),
        ({"x" * 600: torch.ones(3)}, r"a key of 600 characters"),
        ({"c.lora_A.weight": torch.ones(2, 4, 3, 3), "c.lora_B.weight": torch.ones(3, 2, 1, 1)}, r"a convolution of 3 x 3"),
    ],
)
def test_a_file_that_is_no_sound_lora_is_refused(more, sentence, tmp_path):
    safetensors.torch.save_file(state_of(**more), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors: .*{sentence}") as caught:
        read_lora(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_listed_with_the_whole_of_its_layer(tmp_path):
    convolution = {"c.lora_A.weight": torch.ones(2, 4, 3, 3), "c.lora_B.weight": torch.ones(3, 2, 1, 1)}
    dora = {"d.lora_A.weight": torch.ones(2, 4), "d.lora_B.weight": torch.ones(3, 2), "d.lora_magnitude_vector": torch.ones(3)}
    more = {"emb_params": torch.ones(2), "h.hada_w1_a": torch.ones(2), "h.alpha": torch.ones(())}
    safetensors.torch.save_file(state_of(**convolution, **dora, **more), tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors", skip=True)
    assert list(found.pairs) == ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    assert found.skipped.keys() == {*convolution, *dora, *more}
    safetensors.torch.save_file(dora, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no LoRA of a matrix"):
        read_lora(tmp_path / "x.safetensors", skip=True)


def test_convolutions_of_one_pixel_are_matrices(tmp_path):
    tensors = {"c.lora_down.weight": torch.randn(2, 4, 1, 1), "c.lora_up.weight": torch.randn(3, 2, 1, 1)}
    safetensors.torch.save_file(tensors | {"c.alpha": torch.tensor(1)}, tmp_path / "x.safetensors")
    pair = read_lora(tmp_path / "x.safetensors").pairs["c"]
    expected = torch.einsum("prab,rqab->pq", tensors["c.lora_up.weight"], tensors["c.lora_down.weight"]) / 2
    assert torch.allclose(pair.delta(), expected)


def peft_folder(path, **fields):
    tensors = {"base_model.model.a.lora_A.weight": torch.ones(2, 4), "base_model.model.a.lora_B.weight": torch.ones(3, 2)}
    path.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | fields
    (path / "adapter_config.json").write_text(json.dumps(about))
    return path


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"peft_type": "LOHA"}, "peft_type='LOHA'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"r": 3}, "a has rank 2, where its configuration says 3"),
        ({"r": "2"}, "a whole number"),
        ({"lora_alpha": None}, "a finite number"),
        ({"alpha_pattern": {"(a+)+": 3}}, "is a regular expression"),
        ({"alpha_pattern": {"a": "3"}}, "finite numbers"),
        ({"rank_pattern": [1]}, "finite numbers"),
        ({"modules_to_save": [1]}, "list of names"),
    ],
)
def test_a_configuration_that_means_something_else_is_refused(fields, sentence, tmp_path):
    assert read_lora(peft_folder(tmp_path)).pairs["a"].scale == 2
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read_lora(peft_folder(tmp_path, **fields))


def test_no_alpha_is_guessed_for_peft(tmp_path):
    (peft_folder(tmp_path) / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"alpha in adapter_config.json: that file is not beside it"):
        read_lora(tmp_path)


def test_what_is_no_file_of_a_lora(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_lora(tmp_path / "x.safetensors")
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"no LoRA is in it; adapter_model.bin is there, but a pickle"):
        read_lora(tmp_path)
    with pytest.raises(ValueError, match="a pickle by its name"):
        read_lora(tmp_path / "adapter_model.bin")
    for name in "ab":
        safetensors.torch.save_file(state_of(), tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"as a.safetensors: name one"):
        read_lora(tmp_path)


def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path):
    pair = LowRankPair(torch.ones(1, 2), torch.ones(2, 1))
    for write in (write_diffusers_lora, write_kohya_lora):
        with pytest.raises(ValueError, match="no update"):
            write(tmp_path / "x.safetensors", {})
        with pytest.raises(ValueError, match=r"blocks.0.attn.qkv: it begins with no component"):
            write(tmp_path / "x.safetensors", {"blocks.0.attn.qkv": pair})
        with pytest.raises(ValueError, match=r"ends in .safetensors"):
            write(tmp_path / "x.bin", {"unet.mid_block.proj_in": pair})
    with pytest.raises(ValueError, match="Stable Diffusion only"):
        write_kohya_lora(tmp_path / "x.safetensors", {"transformer.blocks.0.to_q": pair})
    with pytest.raises(ValueError, match="Stable Diffusion only"):
        write_kohya_lora(tmp_path / "x.safetensors", {"unet.something_else": pair})
    with pytest.raises(ValueError, match="no update"):
        write_peft_lora(tmp_path / "lora", {})
    assert list(tmp_path.iterdir()) == []


def test_a_pipeline_without_text_encoder_two_calls_its_own_te(tmp_path):
    pipe = stable_diffusion()
    keys = safetensors.torch.load_file(write_kohya_lora(tmp_path / "x.safetensors", made_up(pipe)))
    assert any(key.startswith("lora_te_text_model_encoder_layers_0") for key in keys)
    assert isinstance(pipe, StableDiffusionPipeline)


def test_any_soup_of_keys_is_read_or_refused_in_one_line(tmp_path):
    """Whatever keys and shapes meet: pairs that are sound, or a sentence."""
    generator = random.Random(0)
    layers = [
        "unet.a.to_q",
        "lora_unet_conv_in",
        "base_model.model.b",
        "x.processor.to_out",
        "",
        "lora_te_text_model",
        "..",
        "é\n",
    ]
    endings = [
        ".lora_A.weight",
        ".lora_B.weight",
        ".lora_down.weight",
        ".lora_up.weight",
        "_lora.up.weight",
        "_lora.down.weight",
    ]
    endings += [".alpha", ".lora_A.x.weight", ".dora_scale", ".hada_w1_a", ".weight", ".lora_B.bias", ".lora_mid.weight"]
    shapes = [(), (1,), (2,), (0, 2), (2, 2), (2, 0), (2, 2, 1, 1), (2, 2, 3, 3), (2, 2, 1)]
    outcomes = {"read": 0, "refused": 0}
    for trial in range(300):
        keys = {
            generator.choice(layers[: 1 + trial % 8]) + generator.choice(endings[: 2 + trial % 12])
            for _ in range(1 + trial % 5)
        }
        tensors = {key: torch.ones(generator.choice(shapes if trial % 2 else [(2, 2)])) for key in keys if key}
        safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
        try:
            found = read_lora(tmp_path / "x.safetensors", skip=bool(trial % 3))
        except ValueError as error:
            assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
            outcomes["refused"] += 1
        else:
            assert found.pairs and all(torch.isfinite(pair.delta()).all() for pair in found.pairs.values())
            outcomes["read"] += 1
    assert min(outcomes.values()) > 10, outcomes
