"""The role of a tensor in an update, by the end of its key, in files of peft, diffusers, kohya, LyCORIS and XLabs."""

from __future__ import annotations

import re

# Each is the end of a key; the layer's name comes before it.
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
    ".lora_mid.weight": "mid",
    ".lora_B.bias": "bias",
    ".lora_up.bias": "bias",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    ".set_weight": "set_weight",
    ".fourierft_spectrum": "spectrum",
    ".alpha": "alpha",
} | {
    f".{name}": name
    for name in (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )
}
_NAMED = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.[^.]+\.weight$")  # keys that contain the adapter's name
_XLABS = re.compile(r"(double|single)_blocks\.(\d{1,4})\.processor\.(qkv|proj)_lora([12]?)\.(down|up)\.weight")
_FOREIGN = (
    (r"(.+)\.lora_embedding_[AB](\..+)?", "LoRA of an embedding"),
    (r"(.+)\.oft_\w+(\.weight)?", "OFT, which rotates the weights"),
    (r"(.+)\.boft_\w+(\.weight)?", "BOFT, which rotates the weights"),
    (r"(.+)\.on_input", "IA3, which scales the weights"),
    (r"(.+)\.ia3_l(\..+)?", "IA3, which scales the weights"),
    (r"(.+)\.(a1|a2|b1|b2|bm1|bm2)\.weight", "GLoRA, which transforms the weights"),
    (r"(.+)\.vera_lambda_[bd](\..+)?", "VeRA, whose factors are not in the file"),
    (r"(.+?)(\.lora_A|\.lora_down|_lora\.\w+|\.lora\.\w+)(\.[^.]+)?\.bias", "a bias in the middle of a LoRA"),
    (r"()(emb_params|string_to_\w+.*|clip_[lg]|bundle_emb\..*)", "a textual inversion"),
)


def role_of(key: str) -> tuple[str, str, str]:
    """Return the layer that a key belongs to, and its role: "down", "up", "alpha", "hada_w1_a", ...

    Returns:
        Layer, role, and "". For a key that is not part of an update that can be read here: the layer as far as it can be
        told, "foreign", and a word for the error message.
    """
    plain = _of_xlabs(_NAMED.sub(r".\1.weight", key))
    ending = max((ending for ending in _ROLES if plain.endswith(ending)), key=len, default=None)
    if ending is not None:
        layer = plain.removesuffix(ending)
        # Attention processors used to have LoRA layers of their own, whose names end like this.
        return f"{layer}_lora" if ending.startswith("_lora") else layer, _ROLES[ending], ""
    for pattern, what in _FOREIGN:
        match = re.fullmatch(pattern, key)
        if match:
            return match[1], "foreign", what
    return "", "foreign", "no part of a LoRA"


def _of_xlabs(key: str) -> str:
    """Translate XLabs' names of what a Flux attention processor adds to the names of the layers it is added to."""
    match = _XLABS.fullmatch(key.removeprefix("diffusion_model."))
    if not match:
        return key
    kind, number, part, stream, half = match.groups()
    layer = f"{'img' if stream == '1' else 'txt'}_attn.{part}" if kind == "double" else {"qkv": "qkv", "proj": "linear2"}[part]
    return f"diffusion_model.{kind}_blocks.{number}.{layer}.lora_{half}.weight"
