"""The nodes for ComfyUI without ComfyUI, against each method's formula; `test_comfyui.py` has them with it."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import loca_vision.diffusers as loca
from loca_vision import LoCAConfig, LoRAConfig, __version__, adapters, inject
from support.accelerator import pretended
from support.comfyui_stand_in import NODES, Patcher, import_nodes
from support.formulas import KINDS, changed, stir
from support.pipelines import flux, small_unet, text_encoder
from support.reference_weights import adapter

EVERYWHERE = ("q", "k", "v", "out")
LOCA = LoCAConfig(n_components=12, targets=EVERYWHERE)


class Parts:
    def __init__(self, **components):
        self.components = components


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    return import_nodes(monkeypatch, tmp_path)


@pytest.fixture
def load(nodes):
    return nodes.load


def unet_table(model=None):
    """A UNet as ComfyUI has one, but for the names of its weights, which are those of diffusers here."""
    weights = {f"own.{name}": value for name, value in (model or small_unet()).state_dict().items()}
    layers = {f"lora_unet_{n[4:-7].replace('.', '_')}": n for n in weights if n.endswith(".weight")}
    return Patcher(weights, layers | {"lora_unet_add_embedding_linear_1": "own.nowhere.weight"})


def clip_table(encoder, *names):
    """The same of text encoders."""
    lost = "" if hasattr(encoder, "text_model") else "text_model."
    weights = {f"{name}.transformer.{lost}{key}": v for name in names for key, v in encoder.state_dict().items()}
    return Patcher(weights, {f"text_encoders.{name[:-7]}": name for name in weights if name.endswith(".weight")})


def written(folder, config, whole=(), **components):
    """A file, and by component the stirred updates in it."""
    updates = {}
    for component, model in components.items():
        inject(model, config, modules_to_save=[name for owner, name in whole if owner == component])
        updates[component] = adapters(stir(model))
        for module in (model.get_submodule(name) for owner, name in whole if owner == component):
            torch.nn.init.normal_(module.weight)
    return loca.save_loca_weights(Parts(**components), folder), updates


def target(config, update, weight, strength=1.0):
    """W + strength * (W' - W), in float64, by the formula of the method."""
    new = changed(config, dict(update.named_parameters()) | dict(update.named_buffers()), weight.detach())
    return weight.detach() + strength * (new - weight.detach().double())


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_by_its_formula(kind, elsewhere, load, tmp_path):
    config, model = replace(KINDS[kind], targets=EVERYWHERE), small_unet()
    file, updates = written(tmp_path, config, unet=small_unet())
    table = unet_table(model)
    with pretended(elsewhere):
        patched, clip = load(file, table, None, -0.7, 0.0)
        assert clip is None and not table.patches and len(patched.patches) == len(updates["unet"]) == 16
        for projection, update in updates["unet"].items():
            block, _, part = projection.rpartition(".")
            name = f"own.{block}.to_{'out.0' if part == 'out' else part}.weight"
            wanted = target(config, update, table.weights[name], -0.7)
            torch.testing.assert_close(patched.weight(name).double(), wanted, atol=1e-5, rtol=1e-5)
            half = patched.weight(name, torch.bfloat16)
            near = target(config, update, table.weights[name].bfloat16().float(), -0.7).bfloat16()
            torch.testing.assert_close(half, near, atol=1e-6, rtol=2**-7)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_computed_where_the_weight_is(kind, nodes, tmp_path):
    """And the update stays where it was: clones of the model on other devices have it too."""
    file, _ = written(tmp_path, replace(KINDS[kind], targets=("q",)), unet=small_unet())
    for module, update in nodes.read_updates(file).updates.items():
        patch = nodes.AddedUpdate({module}, (update,))
        weight = torch.empty(update.shape, dtype=torch.float16, device="meta")
        assert patch.calculate_weight(weight, "", 1.0, 1.0, None, lambda difference: difference) is weight
        assert {tensor.device.type for tensor in update.tensors()} == {"cpu"}


def swapped(rows):
    return torch.cat([rows[len(rows) // 2 :], rows[: len(rows) // 2]])


@pytest.mark.parametrize("kind", ["loca", "dora"])
def test_fused_and_reordered_layers(kind, load, tmp_path):
    """A part of a weight gets the update of its module, and where ComfyUI has rows in another order, so has the update."""
    model = flux()
    config = replace(KINDS[kind], targets=("q", "k", "v"), layers=("transformer_blocks.0.attn", "norm_out.linear"))
    block = model.transformer_blocks[0].attn
    qkv = torch.cat([block.to_q.weight, block.to_k.weight, block.to_v.weight]).detach().clone()
    last = model.norm_out.linear.weight.detach().clone()
    layers = {f"transformer.transformer_blocks.0.attn.to_{p}": ("qkv.weight", (0, 16 * i, 16)) for i, p in enumerate("qkv")}
    layers |= {f"transformer.transformer_blocks.0.attn.add_{p}_proj": f"{p}.weight" for p in "qkv"}
    weights = {f"{p}.weight": getattr(block, f"add_{p}_proj").weight for p in "qkv"}
    weights |= {"qkv.weight": qkv, "last.weight": swapped(last)}
    table = Patcher(weights, layers | {"transformer.norm_out.linear": ("last.weight", None, swapped)})
    file, updates = written(tmp_path, config, transformer=model)
    patched, _ = load(file, table, None, 0.5, 0.0)
    found = updates["transformer"]
    parts = zip([found[f"transformer_blocks.0.attn.{p}"] for p in "qkv"], qkv.split(16), strict=True)
    wanted = [target(config, update, rows, 0.5) for update, rows in parts]
    torch.testing.assert_close(patched.weight("qkv.weight").double(), torch.cat(wanted), atol=1e-5, rtol=1e-5)
    wanted = swapped(target(config, found["norm_out.linear"], last, 0.5))
    torch.testing.assert_close(patched.weight("last.weight").double(), wanted, atol=1e-5, rtol=1e-5)


def test_whole_tensors(load, tmp_path):
    model = small_unet()
    file, _ = written(tmp_path, LOCA, [("unet", "conv_in"), ("unet", "conv_norm_out")], unet=model)
    patched, _ = load(file, unet_table(), None, 0.3, 0.0)
    for name in ("conv_in.weight", "conv_in.bias", "conv_norm_out.weight"):
        assert torch.equal(patched.weight(f"own.{name}"), model.get_parameter(name))
    assert not load(file, unet_table(), None, 0.0, 0.0)[0].patches


def test_whole_tensors_of_a_reordered_layer(load, tmp_path):
    model = flux()
    table = Patcher({"x.weight": torch.zeros(32, 16), "x.bias": torch.zeros(32), "q.weight": torch.zeros(16, 16)}, {})
    table.layers |= {"transformer.norm_out.linear": ("x.weight", None, swapped)}
    table.layers |= {"transformer.transformer_blocks.0.attn.to_q": "q.weight"}
    config = replace(LOCA, targets=("q",), layers="transformer_blocks.0.attn.to_q")
    file, _ = written(tmp_path, config, [("transformer", "norm_out.linear")], transformer=model)
    patched, _ = load(file, table, None, 0.5, 0.0)
    for kind in ("weight", "bias"):
        assert torch.equal(patched.weight(f"x.{kind}"), swapped(getattr(model.norm_out.linear, kind)))


PLACES = [("text_encoder", "clip_l"), ("text_encoder", "clip_h"), ("text_encoder_2", "clip_g")]
PLACES += [("text_encoder", "t5xxl"), ("text_encoder_2", "t5xxl"), ("text_encoder_3", "t5xxl")]


@pytest.mark.parametrize(("component", "name"), PLACES)
def test_text_encoders(component, name, load, tmp_path):
    file, updates = written(tmp_path, LOCA, **{"unet": small_unet(), component: text_encoder()})
    table = clip_table(text_encoder(), name, "another")
    model, clip = load(file, unet_table(), table, 0.0, 0.5)
    assert not model.patches and len(clip.patches) == len(updates[component]) == 8
    key = f"{name}.transformer.text_model.encoder.layers.1.self_attn.q_proj.weight"
    update = next(u for n, u in updates[component].items() if n.endswith("encoder.layers.1.self_attn.q"))
    wanted = target(LOCA, update, table.weights[key], 0.5)
    torch.testing.assert_close(clip.weight(key).double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_model_without_its_text_encoders(load, tmp_path, caplog):
    file, _ = written(tmp_path, LOCA, unet=small_unet(), text_encoder=text_encoder())
    with caplog.at_level("INFO"):
        model, clip = load(file, unet_table(), None, 1.0, 1.0)
    assert clip is None and len(model.patches) == 16
    assert "left out, for want of text encoders: text_encoder.text_model.encoder.layers.0.self_attn" in caplog.text
    with pytest.raises(ValueError, match=r"one without text_encoder\.text_model\..* and 5 more"):
        load(file, unet_table(), clip_table(text_encoder(), "clip_g"), 1.0, 1.0)


def test_what_does_not_fit_is_named(load, tmp_path):
    file, _ = written(tmp_path, LOCA, [("unet", "conv_in")], unet=small_unet(channels=8))
    sentence = r": unet\.conv_in\.weight: expected the shape \(16, 8, 3, 3\), got \(16, 4, 3, 3\)$"
    table = unet_table()
    with pytest.raises(ValueError, match=f"^{file}{sentence}"):
        load(file, table, None, 1.0, 0.0)
    gone = unet_table(small_unet(channels=8))
    key = next(name for name in gone.weights if name.endswith("attn2.to_k.weight"))
    shape = tuple(gone.weights[key].shape)
    gone.weights[key] = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=rf"attn2\.to_k: expected a weight of shape \({shape[0]}, {shape[1]}\), got \(3, 5\)$"):
        load(file, gone, None, 1.0, 0.0)
    del gone.weights[key]
    with pytest.raises(ValueError, match=r"expected a model with all its layers \(.+\), got one without unet\.\S+attn2\.to_k$"):
        load(file, gone, None, 1.0, 0.0)
    assert not table.patches and not gone.patches
    file, _ = written(tmp_path / "other", LOCA, decoder=small_unet())
    with pytest.raises(ValueError, match=r"got one without decoder\..* and 13 more"):
        load(file, unet_table(), None, 1.0, 0.0)


def test_two_changes_of_a_weight_are_refused(load, tmp_path):
    """Which ComfyUI would make one of: the last."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    made = adapter(SimpleNamespace(unet=small_unet()), {"unet": ("q",)}, whole=(f"unet.{path}.to_q.weight",))
    with pytest.raises(
        ValueError, match=rf"unet\.{path}\.to_q\.weight: expected one change .* got that of unet\.{path}\.to_q as well"
    ):
        load(made.write(tmp_path), unet_table(), None, 1.0, 0.0)


def test_a_dora_after_another_patch_is_refused(load, tmp_path):
    dora, _ = written(tmp_path / "1", LoRAConfig(r=2, use_dora=True, targets=("q",)), unet=small_unet())
    other, _ = written(tmp_path / "2", LOCA, unet=small_unet())
    first, _ = load(dora, unet_table(), None, 1.0, 0.0)
    assert load(other, first, None, 1.0, 0.0)
    changed, _ = load(other, unet_table(), None, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"attn1\.to_q: its DoRA depends on the weight, which a node before this one changes"):
        load(dora, changed, None, 1.0, 0.0)


def test_the_pack_has_the_version_of_the_library():
    assert f'\nversion = "{__version__}"\n' in (NODES.parent / "pyproject.toml").read_text()


def test_the_nodes(nodes, tmp_path):
    written(tmp_path / "cartoon", LOCA, unet=small_unet(), text_encoder=text_encoder())
    name = "cartoon/pytorch_loca_weights.safetensors"
    both, alone = (nodes.NODE_CLASS_MAPPINGS[key] for key in ("LoadLoCA", "LoadLoCAModelOnly"))
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys()
    assert both.INPUT_TYPES()["required"]["adapter"][0] == [name]
    given = {"model": unet_table(), "clip": clip_table(text_encoder(), "clip_l"), "adapter": name}
    found = getattr(both(), both.FUNCTION)(**given, strength_model=1.0, strength_clip=0.5)
    assert len(found) == len(both.RETURN_TYPES) == 2 and found[0].patches and found[1].patches
    assert list(both.INPUT_TYPES()["required"]) == [*given, "strength_model", "strength_clip"]
    assert list(alone.INPUT_TYPES()["required"]) == ["model", "adapter", "strength_model"]
    (model,) = getattr(alone(), alone.FUNCTION)(model=unet_table(), adapter=name, strength_model=1.0)
    assert alone.RETURN_TYPES == ("MODEL",) and model.patches.keys() == found[0].patches.keys()
