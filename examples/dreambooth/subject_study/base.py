"""A small Stable Diffusion pipeline, trained from scratch to draw what a caption says.

The tokenizer, text encoder, autoencoder and training loop are those of the study of edits, in small_base.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional as F

from loca_vision.data.sampling import stream_seed
from small_base.photo_batches import PhotoBatches
from small_base.pipeline import GROUPS, TEXT_WIDTH, Shape, small_pipeline
from small_base.stages import Stage, autoencoder_loss, measure_scale, train_stage
from subject_study.objects import KINDS
from subject_study.scenes import COLOURS, PLACES, STYLE, SUBJECT, Scene, drawn_scene

_POOL, _STEP = 51, 52  # keys of random number streams
_SILENT, _NO_COLOUR, _NO_PLACE = 0.1, 0.25, 0.25  # shares of captions that are empty, lack the colour, or lack the place


@dataclass(frozen=True)
class BaseSettings:
    """The settings that the base depends on.

    Args:
        resolution: pixels per side.
        channels: channels of the UNet's levels; all levels but the first attend to the caption.
        drawings: the number of training drawings.
        autoencoder_steps, steps: optimiser steps of the autoencoder, and of the UNet and text encoder.
        batch_size: drawings per step.
        learning_rate: the highest learning rate of the UNet and text encoder.
        seed: the seed of the weights, the drawings and the noise.
    """

    resolution: int
    channels: tuple[int, ...]
    drawings: int
    autoencoder_steps: int
    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def check(self) -> None:
        """Check the settings before anything is written.

        Raises:
            ValueError: a setting is out of range.
        """
        if len(self.channels) < 2:
            raise ValueError(f"channels={list(self.channels)}: they are two or more, of which the first does not attend")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"learning_rate={self.learning_rate}: expected a number between 0 and 1")
        if self.resolution % 8 or self.resolution < 16:
            raise ValueError(f"resolution={self.resolution}: expected a multiple of 8 from 16 up")
        Shape(self.resolution, self.channels)


def trained_base(of: BaseSettings, checkpoints: Path, about: dict[str, Any]) -> Any:
    """Return the trained pipeline, resuming from the newest checkpoints if there are any.

    Args:
        about: settings as JSON values; checkpoints with other settings are refused.

    Raises:
        ValueError: a setting is out of range, a checkpoint has other settings, or training diverged.
        OSError: a checkpoint cannot be read or written.
    """
    pipe = _untrained(of)
    scenes = drawn_scenes(of.drawings, of.seed)
    pictures = [torch.from_numpy(np.array(scene.picture(of.resolution))).permute(2, 0, 1).contiguous() for scene in scenes]
    batches = PhotoBatches([[picture] for picture in pictures], of.resolution, of.seed)
    codec = Stage("autoencoder", of.autoencoder_steps, 2e-3, 100)
    train_stage(codec, pipe.vae, autoencoder_loss(pipe.vae, batches, of.batch_size, nullcontext), checkpoints, about)
    pipe.vae.requires_grad_(False)
    pipe.vae.register_to_config(scaling_factor=measure_scale(pipe.vae, batches))
    model = nn.ModuleDict({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    loss = _caption_loss(pipe, scenes, _latents(pipe, pictures), of)
    train_stage(Stage("unet", of.steps, of.learning_rate, 100), model, loss, checkpoints, about)
    return pipe


def drawn_scenes(count: int, seed: int) -> list[Scene]:
    """Draw random scenes of all kinds, colours and places."""
    draws = random.Random(stream_seed(seed, _POOL))
    return [drawn_scene(draws) for _ in range(count)]


def _untrained(of: BaseSettings) -> Any:
    """Return an untrained pipeline: parts of the editing pipeline, and a UNet that predicts the velocity of latents."""
    texts = [
        SUBJECT,
        "two striped",
        "with a crown in crayon style",
        STYLE,
        *(f"{kind} {kind}s" for kind in KINDS),
        *COLOURS,
        *PLACES,
    ]
    parts = small_pipeline(Shape(of.resolution, of.channels), texts, of.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(of.seed)
        unet = _unet(of)
    pipe = StableDiffusionPipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(parts.scheduler.config, prediction_type="v_prediction", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(of: BaseSettings) -> UNet2DConditionModel:
    attending = len(of.channels) - 1
    return UNet2DConditionModel(
        sample_size=of.resolution // 2,
        in_channels=4,
        out_channels=4,
        block_out_channels=of.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * attending),
        up_block_types=(*["CrossAttnUpBlock2D"] * attending, "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # here: the number of heads
        norm_num_groups=GROUPS,
    )


@torch.no_grad()
def _latents(pipe: Any, pictures: Sequence[Tensor]) -> Tensor:
    """Return latents (n, 4, h, w), scaled to a standard deviation of about 1."""
    parts = torch.split(torch.stack(list(pictures)), 64)
    found = [pipe.vae.encode(part.float() / 127.5 - 1).latent_dist.mode() for part in parts]
    return torch.cat(found) * float(pipe.vae.config.scaling_factor)


def _caption_loss(pipe: Any, scenes: Sequence[Scene], latents: Tensor, of: BaseSettings) -> Callable[[int], Tensor]:
    """Return the loss: the squared error of the velocity at random timesteps of random drawings."""

    def loss_at(step: int) -> Tensor:
        draws = random.Random(stream_seed(of.seed, step, _STEP))
        chosen = [draws.randrange(len(scenes)) for _ in range(of.batch_size)]
        generator = torch.Generator().manual_seed(draws.getrandbits(62))
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(chosen),), generator=generator)
        texts = pipe.encode_prompt([_said(scenes[number], draws) for number in chosen], "cpu", 1, False)[0]
        noisy = pipe.scheduler.add_noise(clean, noise, times)
        wanted = pipe.scheduler.get_velocity(clean, noise, times)
        return F.mse_loss(pipe.unet(noisy, times, texts).sample, wanted)

    return loss_at


def _said(scene: Scene, draws: random.Random) -> str:
    """Return the scene's caption, possibly without colour or place, or empty."""
    silent, colour, place = draws.random() < _SILENT, draws.random() >= _NO_COLOUR, draws.random() >= _NO_PLACE
    return "" if silent else scene.caption(colour=colour, place=place)
