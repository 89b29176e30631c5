"""The loss of InstructPix2Pix as pure functions: what is drawn, what is left out, what is to be predicted, how it counts.

Everything drawn is a function of (seed, step, place in the batch): the same in one process and in several, and however a
batch is cut into parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from loca_vision.data.sampling import stream_seed

_POSTERIOR, _NOISE, _TIMESTEP, _DROPOUT = range(21, 25)  # keys of streams of random numbers


@dataclass(frozen=True)
class Draws:
    """Random numbers of some samples of one optimiser step, on the CPU.

    posterior, noise: (b, c, h, w) standard normal, to sample the latents with and to add to them.
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
    count: int, shape: tuple[int, ...], *, timesteps: int, seed: int, step: int, rank: int = 0, first: int | None = None
) -> Draws:
    """What is drawn for the samples of one process in one optimiser step. float32; no global generator is touched.

    Args:
        count: of the samples.
        shape: (c, h, w) of a latent.
        timesteps: how many the scheduler was trained with.
        step: optimiser steps before this one.
        rank: of the process; all have as many samples.
        first: place of the first sample in the batch of all processes, where that is not rank * count: as of a part of
            a batch whose gradients are accumulated.
    """
    start = rank * count if first is None else first

    def each(stream: int, draw: Callable[[torch.Generator], Tensor]) -> Tensor:
        keys = (stream_seed(seed, step, start + place, stream) for place in range(count))
        return torch.stack([draw(torch.Generator().manual_seed(key)) for key in keys])

    return Draws(
        each(_POSTERIOR, lambda generator: torch.randn(shape, generator=generator)),
        each(_NOISE, lambda generator: torch.randn(shape, generator=generator)),
        each(_TIMESTEP, lambda generator: torch.randint(timesteps, (), generator=generator)),
        each(_DROPOUT, lambda generator: torch.rand((), generator=generator)),
    )


def sampled(moments: Tensor, posterior: Tensor, scaling_factor: float) -> Tensor:
    """A sample of the latents, as the UNet is trained on them: (b, 2, c, h, w) mean and deviation to (b, c, h, w).

    `latent_dist.sample() * scaling_factor`, with the noise given, in the dtype of the moments.
    """
    mean, deviation = moments.unbind(1)
    return (mean + deviation * posterior.to(moments)) * scaling_factor


def dropped(uniform: Tensor, probability: float) -> tuple[Tensor, Tensor]:
    """Which samples lose their text and which their image, of one uniform number each: (b,) truths.

    Text alone below p, both from p to 2p, the image alone from 2p to 3p (Brooks et al., 2023, section 3.2.1: p = 5 %).

    Raises:
        ValueError: a probability that is not from 0 to 1/3.
    """
    if not 0 <= probability <= 1 / 3:
        raise ValueError(f"conditioning_dropout_prob={probability!r}: it is a number from 0 to 1/3, for three kinds of dropout")
    return uniform < 2 * probability, (uniform >= probability) & (uniform < 3 * probability)


def without_conditioning(
    text: Tensor, image: Tensor, null_text: Tensor, uniform: Tensor, probability: float
) -> tuple[Tensor, Tensor]:
    """Text and image with those that are dropped replaced: by the embedding of the empty text, and by zeros.

    Args:
        text: (b, tokens, width).
        image: (b, c, h, w) latents of the original.
        null_text: (tokens, width) or (1, tokens, width), of the text "".
        uniform: (b,) in [0, 1).
    """
    no_text, no_image = (mask.to(text.device) for mask in dropped(uniform, probability))
    return torch.where(no_text[:, None, None], null_text.to(text), text), image * (~no_image)[:, None, None, None].to(image)


def target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """What the UNet is to predict of noisy latents: (b, c, h, w).

    Raises:
        ValueError: the scheduler's `prediction_type` is not epsilon, v_prediction or sample.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":  # Salimans and Ho, 2022: v = alpha noise - sigma x
        velocity: Tensor = scheduler.get_velocity(latents, noise, timesteps)
        return velocity
    if kind == "sample":
        return latents
    raise ValueError(f"prediction_type={kind!r}: the choices are 'epsilon', 'v_prediction' and 'sample'")


def signal_to_noise(scheduler: Any, timesteps: Tensor) -> Tensor:
    """alpha^2 / sigma^2 at some timesteps: (b,) float32."""
    kept = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr: Tensor = kept.sqrt() ** 2 / (1 - kept).sqrt() ** 2
    return snr


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """How much each sample counts: min(SNR, gamma), by the SNR for epsilon and by SNR + 1 for v (Hang et al., 2023, eq. 8).

    Finite for an SNR of 0, as of schedules that end in pure noise: 1 for epsilon.

    Raises:
        ValueError: gamma is not above 0.
    """
    if not gamma > 0:
        raise ValueError(f"snr_gamma={gamma!r}: it is a number above 0")
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    least = snr.clamp(max=gamma)
    return least / (snr + 1) if prediction_type == "v_prediction" else least


def denoising_loss(prediction: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean squared error in float32, of every sample times its weight where there are any."""
    errors = (prediction.float() - wanted.float()).square().flatten(1).mean(1)
    return errors.mean() if weights is None else (errors * weights).mean()
