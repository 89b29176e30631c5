"""Flow matching, as Stable Diffusion 3, Flux and Flux.2 are trained: straight lines from images to noise."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3
from torch import Tensor

Weighting = Literal["sigma_sqrt", "logit_normal", "mode", "cosmap", "none"]


@dataclass(frozen=True)
class Flow:
    """Rectified flow (Liu et al., 2023; Esser et al., 2024): noisy latents are (1 - sigma) x + sigma noise, and the velocity
    noise - x is to be predicted.

    Args:
        scheduler: a `FlowMatchEulerDiscreteScheduler` as constructed, whose timesteps decrease with their index.
        weighting_scheme: how timesteps are drawn or weighted (Esser et al., 2024, section 3.1), as in diffusers' scripts.
        logit_mean, logit_std: for "logit_normal", of the normal number whose sigmoid is the share of the way.
        mode_scale: s of that section's "mode".
        precondition_outputs: measure the error of the image that the prediction implies, x' = noisy - sigma prediction,
            instead of the velocity's: each sample is then weighted by sigma^2 (Karras et al., 2022, section 5).
    """

    scheduler: Any
    weighting_scheme: Weighting = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    precondition_outputs: bool = False

    def timestep(self, generator: torch.Generator) -> Tensor:
        """Return the index of a random timestep, () int64."""
        share = self._share(generator)
        count = int(self.scheduler.config.num_train_timesteps)
        index: Tensor = (share * count).long().clamp(0, count - 1)
        return index

    def _share(self, generator: torch.Generator) -> Tensor:
        """Return the share of the way from noise to image, () in [0, 1], as `compute_density_for_timestep_sampling` of
        diffusers does, which takes no generator in older versions."""
        if self.weighting_scheme == "logit_normal":
            return torch.sigmoid(self.logit_mean + self.logit_std * torch.randn((), generator=generator))
        share = torch.rand((), generator=generator)
        if self.weighting_scheme == "mode":
            share = 1 - share - self.mode_scale * (torch.cos(math.pi * share / 2) ** 2 - 1 + share)
        return share

    def sigmas(self, indices: Tensor) -> Tensor:
        """Return the shares of noise: (b, 1, 1, 1) float32 in (0, 1]."""
        found: Tensor = self.scheduler.sigmas.to(indices.device)[indices].float()
        return found[:, None, None, None]

    def noisy(self, latents: Tensor, noise: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy latents (b, c, h, w), and the timesteps (b,), 1000 times their sigmas."""
        sigmas = self.sigmas(indices)
        timesteps: Tensor = self.scheduler.timesteps.to(indices.device)[indices]
        return (1 - sigmas) * latents + sigmas * noise, timesteps

    def target(self, latents: Tensor, noise: Tensor, indices: Tensor) -> Tensor:
        """Return the velocity: (b, c, h, w)."""
        return noise - latents

    def weights(self, indices: Tensor) -> Tensor:
        """Return the weight of each sample's squared velocity error: (b,) float32."""
        sigmas = self.sigmas(indices).flatten()
        weights: Tensor = compute_loss_weighting_for_sd3(self.weighting_scheme, sigmas)
        return weights * sigmas.square() if self.precondition_outputs else weights
