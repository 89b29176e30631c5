"""The random numbers for the samples of a step.

They are a function of (seed, step, place in the batch): the same in one process and in several, and however a batch is cut
into parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loca_vision.data.sampling import stream_seed

_POSTERIOR, _NOISE, _TIMESTEP, _DROPOUT, _OFFSET = range(21, 26)  # keys of streams of random numbers


@dataclass(frozen=True)
class Draws:
    """Random numbers for some samples of one optimiser step, on the CPU.

    posterior, noise: (b, c, h, w) standard normal, for sampling the latents and for adding to them.
    timesteps: (b,) int64 in [0, number of them).
    dropout: (b,) uniform in [0, 1).
    """

    posterior: Tensor
    noise: Tensor
    timesteps: Tensor
    dropout: Tensor

    def to(self, device: torch.device | str) -> Draws:
        return Draws(*(value.to(device) for value in vars(self).values()))


def draws(
    count: int,
    shape: tuple[int, ...],
    *,
    timestep: Callable[[torch.Generator], Tensor],
    seed: int,
    step: int,
    rank: int = 0,
    first: int | None = None,
    noise_offset: float = 0.0,
) -> Draws:
    """Draw the random numbers for one process's samples in one optimiser step. float32; no global generator is used.

    Args:
        count: number of samples.
        shape: (c, h, w) of a latent.
        timestep: draws a timestep, () int64.
        step: number of optimiser steps before this one.
        rank: rank of the process; all have the same number of samples.
        first: place of the first sample in the batch of all processes, if it is not rank * count, as for a part of a batch
            whose gradients are accumulated.
        noise_offset: a normal number for each channel times this is added to the noise, so that a whole picture may become
            lighter or darker (https://www.crosslabs.org/blog/diffusion-with-offset-noise).
    """
    start = rank * count if first is None else first

    def each(stream: int, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        keys = (stream_seed(seed, step, start + place, stream) for place in range(count))
        return torch.stack([draw(torch.Generator().manual_seed(key)) for key in keys])

    noise = each(_NOISE, lambda generator: torch.randn(shape, generator=generator))
    if noise_offset:
        noise += noise_offset * each(_OFFSET, lambda generator: torch.randn((shape[0], 1, 1), generator=generator))
    return Draws(
        each(_POSTERIOR, lambda generator: torch.randn(shape, generator=generator)),
        noise,
        each(_TIMESTEP, timestep),
        each(_DROPOUT, lambda generator: torch.rand((), generator=generator)),
    )
