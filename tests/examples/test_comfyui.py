"""The nodes for ComfyUI against ComfyUI's own code: the weights that it computes with are those of the same base in diffusers.

They need a checkout of ComfyUI, whose path is COMFYUI_PATH, and what it imports.
"""

import asyncio
import copy
import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import loca_vision.diffusers as loca
from loca_vision import LoCAConfig, LoRAConfig, inject, remove
from support import comfyui_models as tiny
from support.formulas import KINDS, stir

tiny.import_comfyui()
pytestmark = pytest.mark.filterwarnings("ignore")  # what ComfyUI makes others warn of is its own affair
execution, folder_paths, nodes = (importlib.import_module(name) for name in ("execution", "folder_paths", "nodes"))
comfy_patcher = importlib.import_module("comfy.model_patcher")

EVERYWHERE = ("q", "k", "v", "out", "fc1", "fc2")
LOCA = LoCAConfig(n_components=40, scale=1.5, targets=EVERYWHERE)
IN_CLIP = LoCAConfig(n_components=40, targets=EVERYWHERE)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def load():
    """`load` of the nodes, which are loaded by ComfyUI."""
    assert asyncio.run(nodes.load_custom_node(str(tiny.NODES)))
    return sys.modules[nodes.NODE_CLASS_MAPPINGS["LoadLoCA"].__module__].load


def written(folder, configs, whole=(), seed=3, **components):
    """A file with a stirred adapter of components, some parameters (component, module) of which are trained whole."""
    components = copy.deepcopy(components)
    for component, config in configs.items():
        chosen = [module for owner, module in whole if owner == component]
        inject(components[component], config, modules_to_save=chosen)
        stir(components[component], seed=seed)
    for component, module in whole:
        for parameter in components[component].get_submodule(module).parameters():
            nn.init.normal_(parameter, std=0.3)
    return loca.save_loca_weights(tiny.Parts(**components), folder)


def in_diffusers(files, strengths, **components):
    """Copies of components with the adapters loaded and folded into the weights."""
    parts = tiny.Parts(**copy.deepcopy(components))
    names = [f"number_{i}" for i in range(len(files))]
    for file, name in zip(files, names, strict=True):
        loca.load_loca_weights(parts, file, adapter_name=name)
    loca.set_loca_adapters(parts, names, strengths)
    for component in dict.fromkeys(c for c, held in loca.get_loca_adapters(parts).items() if held):
        remove(parts.components[component], merge=True)
    return parts.components


def assert_near(found, wanted, tolerance=1e-6):
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].float(), value.float(), atol=tolerance, rtol=tolerance, msg=key)


def changed(found, base):
    return {key for key, value in base.items() if not torch.equal(found[key], value)}


# Every kind, every model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, -0.6])
def test_every_kind(kind, strength, load, tmp_path):
    model = tiny.unet()
    config = replace(KINDS[kind], targets=EVERYWHERE)
    file = written(tmp_path, {"unet": config}, unet=model)
    patched, _ = load(file, tiny.patcher(model), None, strength, 0.0)
    wanted = tiny.named(in_diffusers([file], [strength], unet=model)["unet"])
    found = tiny.effective(patched)
    assert len(changed(found, tiny.named(model))) == 4 * 10
    assert_near(found, wanted)


MODELS = {"xl": lambda: tiny.unet(xl=True), "edit": lambda: tiny.unet(channels=8), "sd3": tiny.sd3, "flux": tiny.flux}


def inputs(model, patched):
    """Of one forward in diffusers, and of the same in ComfyUI."""
    torch.manual_seed(5)
    text, pooled = torch.randn(2, 6, 24), torch.randn(2, 16)
    if hasattr(model.config, "guidance_embeds"):  # Flux
        tokens, grid = torch.randn(2, 16, 16), torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
        places = torch.cat([torch.zeros(16, 1), grid], 1)
        own = {"hidden_states": tokens, "encoder_hidden_states": text, "pooled_projections": pooled}
        own |= {"timestep": torch.full((2,), 0.3), "img_ids": places, "txt_ids": torch.zeros(6, 3)}
        theirs = (tokens, places.expand(2, -1, -1), text, torch.zeros(2, 6, 3), torch.full((2,), 0.3), pooled)
        return own, theirs, patched.model.diffusion_model.forward_orig
    sample, step = torch.randn(2, model.config.in_channels, 8, 8), torch.tensor([3, 3])
    if hasattr(model.config, "joint_attention_dim"):
        own = {"hidden_states": sample, "encoder_hidden_states": text, "pooled_projections": pooled, "timestep": step}
        return own, (sample, step.float(), text, pooled), patched.model.diffusion_model
    if model.config.use_linear_projection:
        text, ids = torch.randn(2, 6, 40), torch.randn(2, 6)
        own = {"sample": sample, "timestep": step[0], "encoder_hidden_states": text}
        time = model.add_time_proj(ids.flatten()).reshape(2, -1)
        own["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
        return own, (sample, step, text, torch.cat([pooled, time], 1)), patched.model.diffusion_model
    return (
        {"sample": sample, "timestep": step[0], "encoder_hidden_states": text},
        (sample, step, text),
        patched.model.diffusion_model,
    )


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_model_computes_the_same(name, load, tmp_path):
    model = MODELS[name]()
    component = "transformer" if name in ("sd3", "flux") else "unet"
    around = ("proj_in", "proj_out") if component == "unet" else ()
    everything = LoCAConfig(n_components=40, scale=1.5, targets=("q", "k", "v", "out", "linear", *around))
    with torch.enable_grad():
        file = written(tmp_path, {component: everything}, **{component: model})
    reference = in_diffusers([file], [0.7], **{component: model})[component]
    plain = tiny.patcher(model)
    patched, _ = load(file, plain, None, 0.7, 0.0)
    assert_near(tiny.effective(patched), tiny.named(reference))
    own, theirs, forward = inputs(model, patched)
    assert_near({"": forward(*theirs)}, {"": model(**own, return_dict=False)[0]}, 1e-4)
    patched.patch_model(CPU)
    wanted = reference(**own, return_dict=False)[0]
    assert (wanted - model(**own, return_dict=False)[0]).abs().max() > 0.01
    assert_near({"": forward(*theirs)}, {"": wanted}, 1e-4)
    patched.unpatch_model(CPU)


CLIPS = {
    "sd15": lambda: {"text_encoder": ("clip_l", tiny.clip_encoder())},
    "sd2": lambda: {"text_encoder": ("clip_h", tiny.clip_encoder())},
    "sdxl": lambda: {
        "text_encoder": ("clip_l", tiny.clip_encoder()),
        "text_encoder_2": ("clip_g", tiny.clip_encoder(3, projection=True, hidden=16)),
    },
    "sd3": lambda: CLIPS["sdxl"]() | {"text_encoder_3": ("t5xxl", tiny.t5_encoder())},
    "flux": lambda: {"text_encoder": ("clip_l", tiny.clip_encoder()), "text_encoder_2": ("t5xxl", tiny.t5_encoder())},
}


@pytest.mark.parametrize("family", CLIPS)
def test_text_encoders(family, load, tmp_path):
    held = CLIPS[family]()
    encoders, model = {name: encoder for name, (_, encoder) in held.items()}, tiny.unet()
    file = written(tmp_path, {"unet": LOCA, **dict.fromkeys(encoders, IN_CLIP)}, unet=model, **encoders)
    wanted = in_diffusers([file], [{"unet": 0.5, **dict.fromkeys(encoders, 0.8)}], unet=model, **encoders)
    clip = tiny.clip(family, **{own: encoder for own, encoder in held.values()})
    patched, texts = load(file, tiny.patcher(model), clip, 0.5, 0.8)
    assert_near(tiny.effective(patched), tiny.named(wanted["unet"]))
    found = tiny.effective(texts.patcher)
    expected = tiny.encoder_weights(**{own: wanted[name] for name, (own, _) in held.items()})
    assert_near(found, expected)
    base = tiny.encoder_weights(**{own: encoder for own, encoder in held.values()})
    assert {key.partition(".")[0] for key in changed(found, base)} == {own for own, _ in held.values()}


@torch.no_grad()
def test_a_text_encoder_computes_the_same(load, tmp_path):
    encoder = tiny.clip_encoder()
    with torch.enable_grad():
        file = written(tmp_path, {"text_encoder": IN_CLIP}, text_encoder=encoder)
    wanted = in_diffusers([file], [1.0], text_encoder=encoder)["text_encoder"]
    _, texts = load(file, tiny.patcher(tiny.unet()), tiny.clip("sd15", clip_l=encoder), 1.0, 1.0)
    tokens = torch.tensor([[49406, 320, 2368] + 74 * [49407]])
    texts.patcher.patch_model(CPU)
    found = texts.cond_stage_model.clip_l.transformer(tokens)[0]
    torch.testing.assert_close(found, wanted(tokens).last_hidden_state, atol=1e-4, rtol=1e-4)
    texts.patcher.unpatch_model(CPU)


# One after the other, and back


def test_several_one_after_the_other(load, tmp_path):
    model = tiny.unet()
    files = [
        written(tmp_path / "1", {"unet": LOCA}, unet=model),
        written(tmp_path / "2", {"unet": KINDS["lora"]}, seed=4, unet=model),
    ]
    patched = tiny.patcher(model)
    for file, strength in zip(files, (0.5, -1.5), strict=True):
        patched, _ = load(file, patched, None, strength, 0.0)
    assert_near(tiny.effective(patched), tiny.named(in_diffusers(files, [0.5, -1.5], unet=model)["unet"]))


@pytest.mark.parametrize("first", [True, False])
def test_beside_a_lora_of_comfyui(first, load, tmp_path):
    model, sd = tiny.unet(), importlib.import_module("comfy.sd")
    file = written(tmp_path, {"unet": LOCA}, unet=model)
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    key, up, down = f"lora_unet_{layer.replace('.', '_')}", torch.randn(32, 2), torch.randn(2, 32)
    lora = {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down}
    patched = tiny.patcher(model)
    for ours in (first, not first):
        patched = (load(file, patched, None, 0.5, 0.0) if ours else sd.load_lora_for_models(patched, None, lora, 0.25, 0.0))[0]
    wanted = in_diffusers([file], [0.5], unet=model)["unet"]
    with torch.no_grad():
        wanted.get_submodule(layer).weight += 0.25 * up @ down
    assert_near(tiny.effective(patched), tiny.named(wanted))


def test_the_base_is_back_bit_for_bit(load, tmp_path):
    model = tiny.unet()
    plain = tiny.patcher(model)
    file = written(tmp_path, {"unet": LOCA}, unet=model)
    patched, _ = load(file, plain, None, 1.0, 0.0)
    assert not plain.patches and patched.model is plain.model
    assert changed(tiny.effective(patched), tiny.named(model))
    assert not changed(plain.model.state_dict(), tiny.named(model))
    nothing, _ = load(file, plain, None, 0.0, 0.0)
    assert not nothing.patches


def test_a_dora_comes_first(load, tmp_path):
    model = tiny.unet()
    dora, other = replace(KINDS["dora"], targets=("q",)), replace(LOCA, targets=("q",))
    files = [written(tmp_path / "1", {"unet": dora}, unet=model), written(tmp_path / "2", {"unet": other}, unet=model)]
    first, _ = load(files[0], tiny.patcher(model), None, 0.8, 0.0)
    both, _ = load(files[1], first, None, 1.0, 0.0)
    assert_near(tiny.effective(both), tiny.named(in_diffusers(files, [0.8, 1.0], unet=model)["unet"]))
    second, _ = load(files[1], tiny.patcher(model), None, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"attn1\.to_q: its DoRA depends on the weight, which a node before this one changes"):
        load(files[0], second, None, 0.8, 0.0)


def test_models_merged_by_comfyui(load, tmp_path):
    """ComfyUI builds the patched weights of one model inside those of another."""
    one, other = tiny.unet(), tiny.unet(1)
    file = written(tmp_path, {"unet": KINDS["dora"]}, unet=other)
    patched, _ = load(file, tiny.patcher(other), None, 1.0, 0.0)
    merging = importlib.import_module("comfy_extras.nodes_model_merging")
    (both,) = merging.ModelMergeSimple().merge(tiny.patcher(one), patched, 0.25)
    changed_one = tiny.named(in_diffusers([file], [1.0], unet=other)["unet"])
    wanted = {key: 0.25 * value + 0.75 * changed_one[key] for key, value in tiny.named(one).items()}
    assert_near(tiny.effective(both), wanted)


# Tensors trained whole


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_whole_tensors_replace_the_models(strength, load, tmp_path):
    model, encoder = tiny.unet(), tiny.clip_encoder()
    lost = "" if hasattr(encoder, "text_model") else "text_model."
    norm = f"{'' if lost else 'text_model.'}final_layer_norm"
    parts = {"unet": model, "text_encoder": encoder}
    whole = [("unet", "conv_in"), ("unet", "time_embedding.linear_1"), ("text_encoder", norm)]
    file = written(tmp_path, {"unet": LOCA, "text_encoder": IN_CLIP}, whole, **parts)
    wanted = in_diffusers([file], [strength], **parts)
    patched, texts = load(file, tiny.patcher(model), tiny.clip("sd15", clip_l=encoder), strength, strength)
    found = tiny.effective(patched)
    assert {"diffusion_model.input_blocks.0.0.bias", "diffusion_model.time_embed.0.weight"} <= changed(found, tiny.named(model))
    assert_near(found, tiny.named(wanted["unet"]))
    assert_near(tiny.effective(texts.patcher), tiny.encoder_weights(clip_l=wanted["text_encoder"]))


def test_whole_tensors_of_fused_and_reordered_layers(load, tmp_path):
    model = tiny.sd3()
    whole = [("transformer", name) for name in ("norm_out.linear", "transformer_blocks.0.attn.to_k", "context_embedder")]
    file = written(tmp_path, {"transformer": LoCAConfig(n_components=9, targets=("q",))}, whole, transformer=model)
    patched, _ = load(file, tiny.patcher(model), None, 1.0, 0.0)
    found, wanted = tiny.effective(patched), tiny.named(in_diffusers([file], [1.0], transformer=model)["transformer"])
    assert "diffusion_model.final_layer.adaLN_modulation.1.bias" in changed(found, tiny.named(model))
    assert_near(found, wanted)


def test_a_dora_of_a_reordered_layer(load, tmp_path):
    model = tiny.sd3()
    config = LoRAConfig(r=2, use_dora=True, targets=("q",), layers=("norm_out.linear", "*.to_q"))
    file = written(tmp_path, {"transformer": config}, transformer=model)
    patched, _ = load(file, tiny.patcher(model), None, 0.7, 0.0)
    found, wanted = tiny.effective(patched), tiny.named(in_diffusers([file], [0.7], transformer=model)["transformer"])
    assert "diffusion_model.final_layer.adaLN_modulation.1.weight" in changed(found, tiny.named(model))
    assert_near(found, wanted)


# Precisions, and memory


@torch.no_grad()
def rounded(model, dtype):
    """The model with its weights rounded to a dtype and back."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype).float())
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype, load, tmp_path):
    model = tiny.unet().to(dtype)
    file = written(tmp_path, {"unet": LOCA}, unet=tiny.unet())
    found = tiny.effective(load(file, tiny.patcher(model, dtype), None, 1.0, 0.0)[0])
    wanted = tiny.named(in_diffusers([file], [1.0], unet=copy.deepcopy(model).float())["unet"])
    for key, value in wanted.items():
        assert found[key].dtype == dtype
        torch.testing.assert_close(found[key], value.to(dtype), atol=1e-7, rtol=torch.finfo(dtype).eps)
    patched, _ = load(file, tiny.patcher(model, dtype), None, 1.0, 0.0)
    for key in patched.patches:  # as it is computed when the layer is called
        late = comfy_patcher.LowVramPatch(key, patched.patches)(patched.model.state_dict()[key].clone())
        assert late.dtype == dtype and torch.equal(late, found[key])


def test_float8_is_rounded_as_comfyui_does(load, tmp_path):
    dtype = torch.float8_e4m3fn
    model = rounded(tiny.unet(), dtype)
    file = written(tmp_path, {"unet": LOCA}, unet=model)
    wanted = tiny.named(in_diffusers([file], [1.0], unet=model)["unet"])
    found = tiny.effective(load(file, tiny.patcher(model, dtype), None, 1.0, 0.0)[0])
    assert len(changed({key: value.float() for key, value in found.items()}, tiny.named(model))) == 40
    for key, value in wanted.items():  # stochastically: to one of the two nearest numbers
        assert found[key].dtype == dtype
        assert ((found[key].float() - value).abs() <= value.abs() / 8 + 2.0**-8).all(), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
@torch.no_grad()
def test_weights_that_stay_where_they_are(dtype, load, tmp_path):
    """With little memory ComfyUI leaves weights on the host, and computes each when its layer is called."""
    model = rounded(tiny.unet(), dtype)
    with torch.enable_grad():
        file = written(tmp_path, {"unet": LOCA}, unet=model)
    patched, _ = load(file, tiny.patcher(model, dtype, cast=True), None, 0.7, 0.0)
    own, theirs, forward = inputs(model, patched)
    patched.patch_model(CPU, lowvram_model_memory=1)
    assert patched.model.model_lowvram and patched.lowvram_patch_counter() == 40
    wanted = in_diffusers([file], [0.7], unet=model)["unet"](**own, return_dict=False)[0]
    torch.testing.assert_close(forward(*theirs), wanted, atol=1e-4, rtol=1e-4)
    patched.unpatch_model(CPU)


# What is refused


def test_a_file_for_another_model(load, tmp_path):
    file = written(tmp_path, {"unet": LOCA}, unet=tiny.unet(xl=True))
    plain = tiny.patcher(tiny.unet())
    with pytest.raises(
        ValueError,
        match=r"expected a model with all its layers \(.*\), got one without unet\..*transformer_blocks\.1\..* and \d+ more",
    ):
        load(file, plain, None, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"got one without unet\.down_blocks.* and \d+ more"):
        load(file, tiny.patcher(tiny.flux()), None, 1.0, 0.0)
    assert not plain.patches


def test_other_shapes(load, tmp_path):
    eight = written(tmp_path, {"unet": LOCA}, [("unet", "conv_in")], unet=tiny.unet(channels=8))
    with pytest.raises(ValueError, match=r"unet\.conv_in\.weight: expected the shape \(32, 8, 3, 3\), got \(32, 4, 3, 3\)"):
        load(eight, tiny.patcher(tiny.unet()), None, 1.0, 0.0)
    file = written(tmp_path / "2", {"text_encoder": IN_CLIP}, text_encoder=tiny.clip_encoder())
    other = tiny.clip("sd15", clip_l=tiny.clip_encoder(hidden=32))
    with pytest.raises(ValueError, match=r"q_proj: expected a weight of shape \(24, 24\), got \(32, 32\)"):
        load(file, tiny.patcher(tiny.unet()), other, 1.0, 1.0)


def test_text_encoders_are_left_out_of_a_model_alone(load, tmp_path, caplog):
    parts = {"unet": tiny.unet(), "text_encoder": tiny.clip_encoder()}
    file = written(tmp_path, {"unet": LOCA, "text_encoder": IN_CLIP}, **parts)
    with caplog.at_level("INFO"):
        patched, clip = load(file, tiny.patcher(parts["unet"]), None, 1.0, 1.0)
    assert clip is None and len(patched.patches) == 40
    assert "left out, for want of text encoders: text_encoder.text_model.encoder.layers.0" in caplog.text
    with pytest.raises(ValueError, match=r"got one without text_encoder\.text_model.* and \d+ more"):  # the refiner has another
        load(file, tiny.patcher(parts["unet"]), tiny.clip("refiner", clip_g=tiny.clip_encoder(hidden=24)), 1.0, 1.0)


def test_broken_files(load, tmp_path):
    file = written(tmp_path, {"unet": LOCA}, unet=tiny.unet())
    whole = file.read_bytes()
    for content in (whole[:-1], whole.replace(rb"\"loca\"", rb"\"moca\""), b"\x80\x04" + whole):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=str(file)):
            load(file, tiny.patcher(tiny.unet()), None, 1.0, 0.0)
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.safetensors", tiny.patcher(tiny.unet()), None, 1.0, 0.0)


# As ComfyUI runs it


class TinyCheckpoint:
    """In the place of "Load Checkpoint"."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "loaders"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def load(self):
        return tiny.patcher(tiny.unet()), tiny.clip("sd15", clip_l=tiny.clip_encoder())


class Kept:
    """A node at the end of a graph, which keeps what reaches it."""

    OUTPUT_NODE, RETURN_TYPES, FUNCTION, CATEGORY = True, (), "keep", "tests"
    found = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "alone": ("MODEL",), "clip": ("CLIP",)}}

    def keep(self, model, alone, clip):
        Kept.found = tiny.effective(model), tiny.effective(alone), tiny.effective(clip.patcher)
        return {}


def test_what_the_registry_reads():
    found = importlib.import_module("comfy_config.config_parser").extract_node_configuration(str(tiny.NODES))
    assert (found.project.name, found.project.version, found.tool_comfy.display_name) == ("loca-vision", "0.1.0", "LoCA")


def test_a_graph(load, tmp_path, monkeypatch):
    for cls in (TinyCheckpoint, Kept):
        monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, cls.__name__, cls)
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    parts = {"unet": tiny.unet(), "text_encoder": tiny.clip_encoder()}
    file = written(tmp_path / "cartoon", {"unet": LOCA, "text_encoder": IN_CLIP}, **parts)
    name = str(file.relative_to(tmp_path))
    both = {"model": ["1", 0], "clip": ["1", 1], "adapter": name, "strength_model": 0.5, "strength_clip": 0.25}
    graph = {
        "1": {"class_type": "TinyCheckpoint", "inputs": {}},
        "2": {"class_type": "LoadLoCA", "inputs": both},
        "3": {"class_type": "LoadLoCAModelOnly", "inputs": {"model": ["2", 0], "adapter": name, "strength_model": 2.0}},
        "4": {"class_type": "Kept", "inputs": {"model": ["2", 0], "alone": ["3", 0], "clip": ["2", 1]}},
    }
    valid, problem, outputs, _ = asyncio.run(execution.validate_prompt("0", graph, None))
    assert valid, problem
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_: None)
    runner = execution.PromptExecutor(server)
    runner.execute(graph, "0", {}, outputs)
    assert runner.success, runner.status_messages
    once, twice, texts = Kept.found
    assert_near(once, tiny.named(in_diffusers([file], [0.5], **parts)["unet"]))
    assert_near(twice, tiny.named(in_diffusers([file], [2.5], **parts)["unet"]))
    assert_near(texts, tiny.encoder_weights(clip_l=in_diffusers([file], [0.25], **parts)["text_encoder"]))

    graph["2"]["inputs"]["adapter"] = "another.safetensors"
    assert not asyncio.run(execution.validate_prompt("0", graph, None))[0]
