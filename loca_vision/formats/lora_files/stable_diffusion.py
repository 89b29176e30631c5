"""Tell which Stable Diffusion a LoRA is for, and write the header fields that other programs tell it by."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

Family = Literal["sd1", "sd2", "sdxl"]

_WIDTHS: dict[int, Family] = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl"}  # cross-attention; 1280 is XL's refiner
_NAMES: tuple[tuple[str, Family], ...] = (
    (r"xl", "sdxl"),
    (r"(stable-diffusion|\bsd)[-_ ]?v?2(\b|[-_.])", "sd2"),
    (r"(stable-diffusion|\bsd)[-_ ]?v?1(\b|[-_.]|5\b)|pix2pix", "sd1"),
)
# As sd-scripts writes them: `ss_base_model_version`, `ss_v2`, and the architecture of the ModelSpec standard.
_VERSIONS: dict[Family, tuple[str, bool, str]] = {
    "sd1": ("sd_v1", False, "stable-diffusion-v1"),
    "sd2": ("sd_v2", True, "stable-diffusion-v2-512"),
    "sdxl": ("sdxl_base_v1-0", False, "stable-diffusion-xl-v1-base"),
}
_SD2_V = re.compile(r"stable-diffusion-2(-1)?(-unclip.*)?$", re.I)  # those without "-base" predict v at 768 pixels


def family_of(shapes: Mapping[str, tuple[int, int]], base_model: str = "unknown", *, xl: bool = False) -> Family | None:
    """Return the family that the modules or else the name of the base model indicate; None if they indicate nothing.

    Args:
        shapes: (p, q) of the updated weights, by module with its component: `unet.mid_block...attn2.to_k`.
        base_model: the name of the base model, as in an adapter file.
        xl: whether the user said that it is Stable Diffusion XL.

    Raises:
        ValueError: the modules are those of another version than the given one.
    """
    told = next((family for module, shape in shapes.items() if (family := _by_module(module, shape)) is not None), None)
    if xl and told not in (None, "sdxl"):
        raise ValueError(f"sdxl=True: by its modules the adapter is for {_VERSIONS[told][2]}")
    if xl or told is not None:
        return "sdxl" if xl else told
    return next((family for pattern, family in _NAMES if re.search(pattern, base_model, re.I)), None)


def _by_module(module: str, shape: tuple[int, int]) -> Family | None:
    component, _, path = module.partition(".")
    if component == "text_encoder_2":
        return "sdxl"
    if component == "text_encoder":  # 768 is the width of both SD 1's and XL's first
        return "sd2" if shape[1] == 1024 and path.endswith("self_attn.q_proj") else None
    if component != "unet":
        return None
    if path.startswith("add_embedding.") or re.search(r"\.transformer_blocks\.[1-9]", path):
        return "sdxl"
    return _WIDTHS.get(shape[1]) if path.endswith(("attn2.to_k", "attn2.to_v")) else None


def is_told(shapes: Mapping[str, tuple[int, int]], family: Family | None) -> bool:
    """Return whether a first text encoder's names in kohya's keys are certain; without one, nothing depends on it."""
    encoder = any(module.startswith("text_encoder.") for module in shapes)
    return not encoder or family is not None or any(module.endswith(("attn2.to_k", "attn2.to_v")) for module in shapes)


def header_of(family: Family | None, base_model: str = "unknown") -> dict[str, str]:
    """Return the fields by which A1111 and others recognise the base; none if it is unknown.

    A1111 takes a file with any other header field to be for Stable Diffusion 1.
    """
    if family is None:
        return {}
    version, v2, architecture = _VERSIONS[family]
    if family == "sd2" and _SD2_V.search(base_model):
        version, architecture = "sd_v2_v", "stable-diffusion-v2-768-v"
    return {
        "ss_base_model_version": version,
        "ss_v2": str(v2),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models" if family == "sdxl" else "diffusers",
        "modelspec.title": "LoRA",
    }
