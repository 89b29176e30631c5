"""From predictions to the loss, and from the distribution of latents to a sample."""

from __future__ import annotations

from torch import Tensor


def sampled(moments: Tensor, posterior: Tensor) -> Tensor:
    """Sample the latents: (b, 2, c, h, w) mean and deviation to (b, c, h, w).

    This is `latent_dist.sample()` with given noise, in the dtype of the moments.
    """
    mean, deviation = moments.unbind(1)
    return mean + deviation * posterior.to(moments)


def squared_errors(prediction: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean squared error of each sample in float32, times its weight if given: (b,)."""
    errors = (prediction.float() - wanted.float()).square().flatten(1).mean(1)
    return errors if weights is None else errors * weights


def denoising_loss(prediction: Tensor, wanted: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the mean of `squared_errors`: ()."""
    return squared_errors(prediction, wanted, weights).mean()
