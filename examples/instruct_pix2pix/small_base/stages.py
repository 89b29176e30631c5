"""Train a small InstructPix2Pix pipeline from random weights: first its autoencoder, then its UNet to change nothing.

Every random number is a function of (seed, step), so that a resumed run ends with exactly the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from loca_vision.data.sampling import stream_seed
from loca_vision.recipes.diffusion.denoising import Denoising
from loca_vision.recipes.diffusion.draws import draws
from loca_vision.recipes.diffusion.encoders import Encoders
from loca_vision.recipes.diffusion.errors import denoising_loss
from loca_vision.recipes.diffusion.families.stable_diffusion import StableDiffusion
from loca_vision.recipes.editing.loss import without_conditioning
from loca_vision.recipes.training.optimizer_state import optimizer_tensors, restore_optimizer
from loca_vision.storage.run_checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint
from small_base.photo_batches import PhotoBatches

PHRASES = (
    "Keep the photograph as it is",
    "Leave the picture unchanged",
    "Do not change the image",
    "Return the same photo",
    "Change nothing",
)
_WARMUP = 50  # steps during which the rate rises
_KL, _ABSOLUTE = 1e-6, 0.1  # weights of the terms added to the squared pixel error
_LATENT_NOISE, _IMAGE_NOISE = 32, 33  # keys of random number streams
_UNSEEN = 10**9  # a step that no training reaches, for the batch to measure on


@dataclass(frozen=True)
class Stage:
    """One part of the training.

    Args:
        name: the name of its progress bar and of its checkpoint folder.
        steps: optimiser steps.
        lr: the highest rate of AdamW; it warms up over 50 steps and falls to zero with a cosine.
        checkpoint_steps: the number of steps between checkpoints; one is always written after the last step.
    """

    name: str
    steps: int
    lr: float
    checkpoint_steps: int

    def rate(self, step: int) -> float:
        return self.lr * min(1.0, (step + 1) / _WARMUP) * (1 + math.cos(math.pi * step / self.steps)) / 2


def train_stage(
    stage: Stage, model: nn.Module, loss_at: Callable[[int], Tensor], folder: Path, about: Mapping[str, Any]
) -> None:
    """Take all steps that are missing since the newest checkpoint in `folder/NAME`.

    Args:
        loss_at: the loss of a step, counted from 0: a function of the step and the model's weights alone.
        about: settings as JSON values; a checkpoint with other settings is refused.

    Raises:
        ValueError: a checkpoint has other settings, or training diverged.
        OSError: a checkpoint cannot be read or written.
    """
    folder = folder / stage.name
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.lr, betas=(0.9, 0.99), weight_decay=0.0)
    done = _resumed(model, optimizer, folder, about)
    model.train()
    with tqdm(total=stage.steps, initial=done, desc=stage.name, dynamic_ncols=True, disable=None) as bar:
        for step in range(done, stage.steps):
            loss = _step(model, optimizer, loss_at(step), stage.rate(step))
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss is {loss} at step {step + 1} of the {stage.name}: try a smaller rate than {stage.lr}"
                )
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update()
            if (step + 1) % stage.checkpoint_steps == 0 or step + 1 == stage.steps:
                _save(model, optimizer, folder, step + 1, about)
    model.eval()


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, step: int, about: Mapping[str, Any]) -> None:
    tensors, state = optimizer_tensors(optimizer)
    tensors |= {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    write_checkpoint(folder, step, tensors, {"about": dict(about), "optimizer": state, "step": step}, keep=1)


def _resumed(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, about: Mapping[str, Any]) -> int:
    """Restore the model and the optimiser from the newest checkpoint, if any, and return the number of finished steps."""
    path = latest_checkpoint(folder)
    if path is None:
        return 0
    tensors, state = read_checkpoint(path)
    if state["about"] != about:
        raise ValueError(f"{path}: it was written with other settings; choose another folder")
    restore_optimizer(optimizer, tensors, state["optimizer"])
    model.load_state_dict({name[6:]: tensor for name, tensor in tensors.items() if name.startswith("model.")})
    step: int = state["step"]
    return step


Computing = Callable[[], AbstractContextManager[Any]]  # autocast, or nothing


def autoencoder_loss(autoencoder: Any, photos: PhotoBatches, count: int, computing: Computing) -> Callable[[int], Tensor]:
    """Return the loss: squared and absolute pixel errors, plus a very small multiple of the KL divergence to a normal."""

    def loss_at(step: int) -> Tensor:
        images = photos.batch(step, count)
        noise = torch.Generator().manual_seed(stream_seed(photos.seed, step, _LATENT_NOISE))
        with computing():
            found = autoencoder.encode(images).latent_dist
            latents = found.mean + found.std * torch.randn(found.mean.shape, generator=noise)
            decoded = autoencoder.decode(latents).sample
        errors = decoded.float() - images
        divergence: Tensor = found.kl().float().mean() / latents[0, 0].numel()
        loss: Tensor = errors.square().mean() + _ABSOLUTE * errors.abs().mean() + _KL * divergence
        return loss

    return loss_at


@torch.no_grad()
def measure_scale(autoencoder: Any, photos: PhotoBatches) -> float:
    """Return the value for `scaling_factor`: one over the standard deviation of the latents of 64 crops."""
    deviation = autoencoder.encode(photos.batch(_UNSEEN, 64)).latent_dist.mode().std()
    return 1 / float(deviation)


def identity_loss(
    pipe: Any, photos: PhotoBatches, count: int, dropout: float, noise: float, computing: Computing
) -> Callable[[int], Tensor]:
    """Return the loss of InstructPix2Pix where the edited image is the photograph itself.

    Args:
        dropout: the probability of dropping the text alone, and equally the image alone, and both: 0 to 1/3.
        noise: half of the images get noise on their latents, with standard deviations from 0 to this value: conditioning
            augmentation (Ho et al., 2022, section 4). Without it, the UNet would merely copy and ignore the content.
    """
    process = Denoising(pipe.scheduler)
    family = StableDiffusion(pipe, process)
    encoders = Encoders(family)
    texts, empty = encoders.texts(PHRASES)["text"], encoders.texts([""])["text"]

    def loss_at(step: int) -> Tensor:
        images = photos.batch(step, count)
        with torch.no_grad(), computing():
            found = pipe.vae.encode(images).latent_dist
        moments = torch.stack([found.mean, found.std], 1).float()
        drawn = draws(count, tuple(found.mean.shape[1:]), timestep=process.timestep, seed=photos.seed, step=step)
        latents = family.latents(moments, drawn.posterior)
        text = texts[[(step + place) % len(PHRASES) for place in range(count)]]
        text, image = without_conditioning(
            text, _noised(moments[:, 0], noise, photos.seed, step), empty, drawn.dropout, dropout
        )
        noisy, timesteps = process.noisy(latents, drawn.noise, drawn.timesteps)
        with computing():
            prediction = pipe.unet(torch.cat([noisy, image], 1), timesteps, text).sample
        return denoising_loss(prediction, process.target(latents, drawn.noise, drawn.timesteps))

    return loss_at


def _noised(image: Tensor, most: float, seed: int, step: int) -> Tensor:
    """Add noise of a random standard deviation to about half of the latents and return the others unchanged."""
    generator = torch.Generator().manual_seed(stream_seed(seed, step, _IMAGE_NOISE))
    deviations = most * (2 * torch.rand(len(image), generator=generator) - 1).clamp(min=0)
    return image + deviations[:, None, None, None] * torch.randn(image.shape, generator=generator)
