"""The diffusers denoisers whose training steps are calculated: their configurations and the inputs of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from workloads import WIDTHS, sdxl_unet, unet

Name = Literal["sd15", "sdxl", "klein"]
Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments."""


@dataclass(frozen=True)
class Base:
    """A denoiser.

    Args:
        title: the name shown in tables.
        resolution: the pixels per side that it is made for.
        build: builds it on the current device and in the current dtype.
        call: returns the arguments of a forward pass for a batch size and a resolution.
    """

    title: str
    resolution: int
    build: Callable[[], nn.Module]
    call: Callable[[int, int], Call]


def klein(heads: int = 24, double: int = 5, single: int = 20) -> Any:
    """Return the transformer of FLUX.2 klein 4B (3,875,544,576 weights), or a smaller one, frozen."""
    from diffusers import Flux2Transformer2DModel

    return Flux2Transformer2DModel(
        in_channels=128,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=128,
        num_attention_heads=heads,
        joint_attention_dim=3 * 2560,
        guidance_embeds=False,
    ).requires_grad_(False)


def _of_unet(width: int, count: int, resolution: int, **more: int) -> Call:
    side = resolution // 8
    added = {"added_cond_kwargs": {name: torch.randn(count, size) for name, size in more.items()}} if more else {}
    return (torch.randn(count, 4, side, side), torch.full((count,), 500), torch.randn(count, 77, width)), added


def _of_klein(count: int, resolution: int) -> Call:
    tokens = (resolution // 16) ** 2
    return (), {
        "hidden_states": torch.randn(count, tokens, 128),
        "encoder_hidden_states": torch.randn(count, 512, 3 * 2560),
        "timestep": torch.rand(count),
        "img_ids": torch.zeros(count, tokens, 4),
        "txt_ids": torch.zeros(count, 512, 4),
    }


def bases(widths: tuple[int, int, int, int] = WIDTHS, klein_size: tuple[int, int, int] = (24, 5, 20)) -> dict[Name, Base]:
    """Return the real bases, or others with the same structure.

    Args:
        widths: the channels of the UNets' levels; SDXL uses the first three.
        klein_size: the numbers of heads, double-stream blocks and single-stream blocks of FLUX.2 klein.
    """
    xl = partial(_of_unet, 2048, text_embeds=1280, time_ids=6)
    return {
        "sd15": Base("SD 1.5", 512, partial(unet, widths), partial(_of_unet, 768)),
        "sdxl": Base("SDXL", 1024, partial(sdxl_unet, widths[:3]), xl),
        "klein": Base("FLUX.2 klein 4B", 512, partial(klein, *klein_size), _of_klein),
    }
