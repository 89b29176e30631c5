"""Denoising diffusion, as Stable Diffusion 1, 2 and XL are trained: noisy latents, the prediction's target, sample weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Denoising:
    """The noise process of a scheduler with discrete timesteps (Ho et al., 2020).

    Args:
        scheduler: a `DDPMScheduler`.
        snr_gamma: weight samples by `min_snr_weights`; None for equal weights.
    """

    scheduler: Any
    snr_gamma: float | None = None

    def timestep(self, generator: torch.Generator) -> Tensor:
        """Return a random timestep, () int64, drawn uniformly."""
        return torch.randint(self.scheduler.config.num_train_timesteps, (), generator=generator)

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents (b, c, h, w), and what the model is told about their noise: (b,)."""
        return self.scheduler.add_noise(latents, noise, timesteps), timesteps

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what the model should predict: (b, c, h, w)."""
        return target(self.scheduler, latents, noise, timesteps)

    def weights(self, timesteps: Tensor) -> Tensor | None:
        """Return the weight of each sample: (b,), or None if all are equal."""
        if self.snr_gamma is None:
            return None
        snr = signal_to_noise(self.scheduler, timesteps)
        return min_snr_weights(snr, self.snr_gamma, self.scheduler.config.prediction_type)


def target(scheduler: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the UNet should predict for noisy latents: (b, c, h, w).

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
    """Return alpha^2 / sigma^2 at some timesteps: (b,) float32."""
    kept = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
    snr: Tensor = kept.sqrt() ** 2 / (1 - kept).sqrt() ** 2
    return snr


def min_snr_weights(snr: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """Return each sample's weight: min(SNR, gamma) over the SNR for epsilon, or over SNR + 1 for v (Hang et al., 2023, eq. 8).

    It is finite for an SNR of 0, as in schedules that end in pure noise: 1 for epsilon.

    Raises:
        ValueError: gamma is not above 0.
    """
    if not gamma > 0:
        raise ValueError(f"snr_gamma={gamma!r}: expected a number above 0")
    if prediction_type == "epsilon":
        return (gamma / snr).clamp(max=1)
    least = snr.clamp(max=gamma)
    return least / (snr + 1) if prediction_type == "v_prediction" else least
