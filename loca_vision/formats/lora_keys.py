"""What the keys of LoRA files mean, whoever wrote them: peft, diffusers old and new, kohya's sd-scripts."""

from __future__ import annotations

import re
from dataclasses import dataclass

PEFT_PREFIX = "base_model.model."
_MAX_KEY = 500

# Each ends a key; the layer stands before.
_ROLES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
}
_NAMED = re.compile(r"\.lora_([AB])\.[^.]+\.weight$")  # with the adapter's name in it
_FOREIGN = (
    (r"(.+)\.hada_\w+(\.weight)?", "LoHa"),
    (r"(.+)\.lokr_\w+(\.weight)?", "LoKr"),
    (r"(.+)\.(lora_magnitude_vector(\..+)?|dora_scale)", "DoRA, which rescales the weight itself"),
    (r"(.+)\.lora_mid(\..+)?", "a Tucker core of a convolution"),
    (r"(.+)\.lora_embedding_[AB](\..+)?", "LoRA of an embedding"),
    (r"(.+)\.(diff|diff_b|set_weight|w_norm|b_norm)", "the difference of a whole tensor"),
    (r"(.+)\.b?oft_\w+(\.weight)?", "OFT"),
    (r"(.+?)(\.lora_[AB]|\.lora_up|\.lora_down|_lora\.up|\.lora\.up)(\.[^.]+)?\.bias", "a bias of LoRA"),
    (r"()(emb_params|string_to_\w+.*|clip_[lg]|bundle_emb\..*)", "a textual inversion"),
)
_KOHYA = {"lora_unet_": "unet.", "lora_te_": "text_encoder.", "lora_te1_": "text_encoder.", "lora_te2_": "text_encoder_2."}
# Names of modules that have an underscore in them, which kohya's keys have for the dot as well.
_WORDS = (
    *("down_blocks", "mid_block", "up_blocks", "transformer_blocks", "to_q", "to_k", "to_v", "to_out", "proj_in", "proj_out"),
    *("conv_in", "conv_out", "conv_shortcut", "time_emb_proj", "time_embedding", "add_embedding", "linear_1", "linear_2"),
    *("text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("attentions", "resnets", "downsamplers", "upsamplers", "attn1", "attn2", "ff", "net", "proj", "conv", "conv1", "conv2"),
    *("encoder", "layers", "mlp", "fc1", "fc2", "norm", "norm1", "norm2", "norm3", "conv_norm_out"),
)
# The original UNet of SD 1.x, 2.x and SDXL: three entries for each level, two of them with resnet and transformer.
_ORIGINAL = (
    ("input_blocks_0_0", "conv_in"),
    ("time_embed_0", "time_embedding_linear_1"),
    ("time_embed_2", "time_embedding_linear_2"),
    ("label_emb_0_0", "add_embedding_linear_1"),
    ("label_emb_0_2", "add_embedding_linear_2"),
    ("out_2", "conv_out"),
)
_RESNET = {"in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_3": "conv2", "skip_connection": "conv_shortcut"}
_MIDDLE = {"0": "mid_block_resnets_0", "1": "mid_block_attentions_0", "2": "mid_block_resnets_1"}


@dataclass(frozen=True)
class Key:
    """What one key of a LoRA file stands for.

    Args:
        path: of the module, "" where it has none: `unet.mid_block.attentions.0...attn1.to_q`, `blocks.0.attn.qkv`.
        role: "down" (A), "up" (B), "alpha", or "foreign" for what is no part of a LoRA of linear layers.
        what: of the foreign ones, a word for a message.
    """

    path: str
    role: str
    what: str = ""


def parse_key(key: str) -> Key:
    """The module and the part of its update that a key of a LoRA file stands for; `foreign` for every other."""
    if len(key) > _MAX_KEY:
        return Key("", "foreign", f"a key of {len(key)} characters")
    plain = _NAMED.sub(r".lora_\1.weight", key)
    ending = next((ending for ending in _ROLES if plain.endswith(ending)), None)
    if ending is not None:
        return _with_path(plain.removesuffix(ending), _ROLES[ending], old=ending.startswith("_lora"))
    for pattern, what in _FOREIGN:
        match = re.fullmatch(pattern, key)
        if match:
            path = _with_path(match[1], "foreign").path
            return Key(path, "foreign", what)
    return Key("", "foreign", "no part of a LoRA")


def _with_path(layer: str, role: str, *, old: bool = False) -> Key:
    flat = next((prefix for prefix in _KOHYA if layer.startswith(prefix)), None)
    if "." in layer or not layer.startswith(("lora_", "lycoris_")):
        path = layer.removeprefix(PEFT_PREFIX).replace(".processor.", ".")
        path = canonical(_of_old_processor(path) if old or path.endswith("_lora") else path)
        return Key(path, role) if path else Key("", "foreign", "no part of a LoRA")
    path = _KOHYA[flat] + unflattened(layer.removeprefix(flat)) if flat else ""
    if not flat or path.endswith("."):
        return Key("", "foreign", "a name with its dots lost, of no UNet or text encoder that is known")
    return Key(path, role)


def _of_old_processor(path: str) -> str:
    """Attention processors had LoRA layers of their own once: to_q_lora of attn1.processor stands for attn1.to_q."""
    parent, _, name = path.removesuffix("_lora").rpartition(".")
    if parent.endswith("self_attn"):
        return f"{parent}.{name.removeprefix('to_')}_proj"
    return f"{parent}.{'to_out.0' if name == 'to_out' else name}"


def canonical(path: str) -> str:
    """A CLIP text encoder's path as files have it, whether or not the model still has a `text_model` in it."""
    component, _, rest = path.partition(".")
    flattened = component.startswith("text_encoder") and rest.startswith("encoder.layers.")
    return f"{component}.text_model.{rest}" if flattened else path


# Names without dots


def unflattened(name: str) -> str:
    """The path of a module from its name with underscores for dots, in diffusers' terms; "" where it is not known."""
    if name.startswith(("input_blocks_", "middle_block_", "output_blocks_", "time_embed_", "label_emb_", "out_2")):
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
    """A name of the original UNet in terms of diffusers'; "" where it has none."""
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
