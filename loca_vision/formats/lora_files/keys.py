"""Parse the keys of LoRA files: names of peft, diffusers, kohya, LyCORIS, ComfyUI, OneTrainer, and of models' authors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from loca_vision.formats.lora_files.original_names import Layer, layer_of
from loca_vision.formats.lora_files.roles import role_of

PEFT_PREFIX = "base_model.model."
_MAX_KEY = 500

_KOHYA = {
    "lora_unet_": "",
    "lora_transformer_": "transformer.",
    "lycoris_": "",
    "lora_te_": "text_encoder.",
    "lora_te1_": "text_encoder.",
    "lora_te2_": "text_encoder_2.",
    "lora_te3_": "text_encoder_3.",
}
# The prefixes that ComfyUI puts before the names that a model's authors gave its layers.
_COMFY = {
    f"{before}{encoder}.transformer.": f"{component}."
    for before in ("text_encoders.", "")
    for encoder, component in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"), ("t5xxl", "text_encoder_3"))
}
# The prefixes of layers whose names differ between the models' authors and diffusers.
_BLOCKS = ("double_blocks.", "single_blocks.", "joint_blocks.")
_ORIGINAL_UNET = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "label_emb.", "out.0", "out.2")
_OF_UNETS = ("conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_norm_out", "conv_out")
# Module names that contain an underscore, which kohya's keys also use instead of the dot.
_WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out"),
    *("conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2"),
    *("text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("attentions", "resnets", "downsamplers", "upsamplers", "attn1", "attn2", "ff", "net", "proj", "conv", "conv1", "conv2"),
    *("encoder", "layers", "mlp", "fc1", "fc2", "norm", "norm1", "norm2", "norm3", "group_norm", "conv_norm_out"),
    *("layer_norm1", "layer_norm2", "final_layer_norm", "embeddings", "token_embedding", "position_embedding"),
    # In the transformers of Flux, SD3 and PixArt, and in T5.
    *("single_transformer_blocks", "attn", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "proj_mlp"),
    *("norm1_context", "norm2_context", "norm_out", "linear", "x_embedder", "context_embedder", "time_text_embed", "pos_embed"),
    *("timestep_embedder", "guidance_embedder", "text_embedder", "norm_q", "norm_k", "norm_added_q", "norm_added_k"),
    *("adaln_single", "emb", "resolution_embedder", "aspect_ratio_embedder", "caption_projection"),
    *("block", "layer", "SelfAttention", "DenseReluDense", "q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "shared"),
)
# The original UNet of SD 1.x, 2.x and SDXL: three entries for each level, two of them with resnet and transformer.
_ORIGINAL = (
    ("input_blocks_0_0", "conv_in"),
    ("time_embed_0", "time_embedding_linear_1"),
    ("time_embed_2", "time_embedding_linear_2"),
    ("label_emb_0_0", "add_embedding_linear_1"),
    ("label_emb_0_2", "add_embedding_linear_2"),
    ("out_0", "conv_norm_out"),
    ("out_2", "conv_out"),
)
_RESNET = {
    "in_layers_0": "norm1",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_0": "norm2",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {"0": "mid_block_resnets_0", "1": "mid_block_attentions_0", "2": "mid_block_resnets_1"}


@dataclass(frozen=True)
class Key:
    """What one key of a LoRA file stands for.

    Args:
        path: the path of the layer, "" if it has none: `unet.mid_block.attentions.0...attn1.to_q`, `blocks.0.attn.qkv`. If the
            layer is several modules in diffusers, the first of them and how many more there are.
        role: "down" (A), "up" (B), "mid", "alpha", "diff", "hada_w1_a", ..., or "foreign" for what is not part of an update
            that can be read here.
        what: for foreign keys, a word for the error message.
        layer: the modules that make up the layer, and their rows.
    """

    path: str
    role: str
    what: str = ""
    layer: Layer = field(default_factory=lambda: Layer(()))


def family_of(keys: Iterable[str]) -> str:
    """Return whose authors' names a file uses, judging by its blocks: "flux", "sd3", or "" for any other model."""
    families = {"double_blocks": "flux", "single_blocks": "flux", "single_transformer_blocks": "flux", "joint_blocks": "sd3"}
    return next((family for key in keys for word, family in families.items() if word in key[:_MAX_KEY]), "")


def parse_key(key: str, family: str = "") -> Key:
    """Return the module and the part of its update that a key of a LoRA file stands for; any other key is `foreign`.

    Args:
        family: the family of the file's keys from `family_of`: a name like `img_in` by itself could be of several models.
    """
    if len(key) > _MAX_KEY:
        return Key("", "foreign", f"a key of {len(key)} characters")
    name, role, what = role_of(key)
    flat = "." not in name and name.startswith(("lora_", "lycoris_"))
    found = _without_dots(name, family) if flat else _with_dots(name, family)
    if not found.modules:
        lost = "a name with its dots lost, of no UNet, transformer or text encoder that is known"
        return Key("", "foreign", what or (lost if flat else "no part of a LoRA"))
    if family == "flux":  # T5 is its second text encoder, but files call it the third, as in SD3
        found = replace(found, modules=tuple(re.sub(r"^text_encoder_3\.", "text_encoder_2.", name) for name in found.modules))
    more = len(found.modules) - 1
    return Key(found.modules[0] + (f" (and {more} more)" if more else ""), role, what, found)


def layer_of_tensor(module: str, family: str, *, bare: bool = False) -> Layer:
    """Return the modules that a checkpoint's layer stands for, by its name in the authors' layout; none if it is unknown.

    Args:
        bare: the checkpoint is a transformer alone, whose names have no prefix.
    """
    if len(module) > _MAX_KEY:
        return Layer(())
    known = module.startswith(("model.diffusion_model.", *_COMFY))
    return _with_dots(module if known else f"diffusion_model.{module}", family) if known or bare else Layer(())


def _with_dots(name: str, family: str) -> Layer:
    path = name.removeprefix(PEFT_PREFIX)
    for before, component in _COMFY.items():
        if path.startswith(before):
            return Layer((canonical(component + path.removeprefix(before)),))
    path = path.replace(".processor.", ".")
    own = re.sub(r"^(transformer|(model\.)?diffusion_model)\.", "", path)
    flat = own.replace(".", "_")
    original = layer_of(flat) if family and (own.startswith(_BLOCKS) or not path.startswith("transformer.")) else None
    if original is not None:
        return _of_component("transformer.", original)
    if path.startswith(("diffusion_model.", "model.diffusion_model.")):
        own = unflattened(flat) if own.startswith(_ORIGINAL_UNET) else own
        return Layer((_denoiser(own) + own,)) if own else Layer(())
    path = canonical(_of_old_processor(path) if path.endswith("_lora") else path)
    return Layer((path,)) if path else Layer(())


def _without_dots(name: str, family: str) -> Layer:
    prefix = next((prefix for prefix in _KOHYA if name.startswith(prefix)), None)
    if prefix is None:
        return Layer(())
    rest, component = name.removeprefix(prefix), _KOHYA[prefix]
    original = layer_of(rest) if family and not component else None
    if original is not None:
        return _of_component("transformer.", original)
    path = unflattened(rest)
    return Layer((canonical((component or _denoiser(path)) + path),)) if path else Layer(())


def _of_component(component: str, layer: Layer) -> Layer:
    return replace(layer, modules=tuple(component + module for module in layer.modules))


def _denoiser(path: str) -> str:
    """Return the component that has a module of this path: a UNet or a transformer."""
    return "unet." if path.partition(".")[0] in _OF_UNETS else "transformer."


def _of_old_processor(path: str) -> str:
    """Map the LoRA layers that attention processors used to have: to_q_lora of attn1.processor stands for attn1.to_q."""
    parent, _, name = path.removesuffix("_lora").rpartition(".")
    if parent.endswith("self_attn"):
        return f"{parent}.{name.removeprefix('to_')}_proj"
    return f"{parent}.{'to_out.0' if name == 'to_out' else name}"


def canonical(path: str) -> str:
    """Return a CLIP text encoder's path as files have it, whether or not the model still has a `text_model`."""
    component, _, rest = path.partition(".")
    of_clip = rest.startswith(("encoder.layers.", "embeddings.", "final_layer_norm"))
    return f"{component}.text_model.{rest}" if component.startswith("text_encoder") and of_clip else path


# Names without dots


def unflattened(name: str) -> str:
    """Turn the name of a module with underscores for dots into its path in diffusers; "" if it is unknown."""
    if name.startswith(("input_blocks_", "middle_block_", "output_blocks_", "time_embed_", "label_emb_", "out_0", "out_2")):
        name = _of_original(name)
    words: list[str] = []
    while name and not name.endswith("_"):
        fitting = [word for word in _WORDS if name == word or name.startswith(f"{word}_")]
        number = re.match(r"\d+(?=_|$)", name)
        word = number[0] if number else max(fitting, key=len, default="")
        if not word:
            return ""
        words.append(word)
        name = name[len(word) + 1 :]
    return "" if name else ".".join(words)


def _of_original(name: str) -> str:
    """Translate a name in the original UNet to diffusers'; "" if there is none."""
    for original, ours in _ORIGINAL:
        if name == original:
            return ours
    match = re.fullmatch(r"(input_blocks|middle_block|output_blocks)_(\d+)_(.+)", name)
    if not match:
        return ""
    side, number, rest = match[1], int(match[2]), match[3]
    if side == "middle_block":
        place = _MIDDLE.get(match[2], "")
        return f"{place}_{_RESNET.get(rest, rest)}" if place else ""
    first, _, inner = rest.partition("_")
    number -= side == "input_blocks"
    where = f"{'down' if side == 'input_blocks' else 'up'}_blocks_{number // 3}"
    if inner in ("op", "conv"):
        return f"{where}_{'downsamplers' if inner == 'op' else 'upsamplers'}_0_conv"
    kind = {"0": "resnets", "1": "attentions"}.get(first)
    return f"{where}_{kind}_{number % 3}_{_RESNET.get(inner, inner)}" if kind else ""
