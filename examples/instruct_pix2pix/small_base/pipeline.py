"""A small InstructPix2Pix pipeline with random weights: diffusers' own classes, small enough to train on two CPU cores."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from small_base.linear_start import GROUPS as CODEC_GROUPS
from small_base.linear_start import begin_copying, begin_linear

GROUPS = 8  # of group normalisation in the UNet
HEAD = 48  # channels per attention head
TEXT_WIDTH, TEXT_LENGTH = 64, 32  # size of a token's embedding; tokens per text
LATENTS = 4


@dataclass(frozen=True)
class Shape:
    """The sizes of the pipeline's parts.

    Args:
        resolution: pixels per side that the pipeline is made for. Latents have half as many.
        channels: channels of the UNet's levels, each with attention and half as many pixels per side as the one before.
        autoencoder_channels: channels of the autoencoder's two levels.

    Raises:
        ValueError: the resolution cannot be halved often enough, or the channels do not fit the normalisation groups.
    """

    resolution: int = 64
    channels: tuple[int, ...] = (48, 96, 128)
    autoencoder_channels: tuple[int, int] = (32, 64)

    def __post_init__(self) -> None:
        if not self.channels or any(width < GROUPS or width % GROUPS for width in self.channels):
            raise ValueError(f"channels={list(self.channels)}: they are one or more multiples of {GROUPS}")
        outer, inner = self.autoencoder_channels
        least = 4 * CODEC_GROUPS
        if outer < least or inner <= outer or outer % CODEC_GROUPS or inner % CODEC_GROUPS:
            raise ValueError(
                f"autoencoder_channels={[outer, inner]}: they are two multiples of {CODEC_GROUPS}, "
                f"the first at least {least} and the second larger"
            )
        factor = 2 ** len(self.channels)
        if self.resolution < factor or self.resolution % factor:
            raise ValueError(f"resolution={self.resolution}: with {len(self.channels)} levels it is a multiple of {factor}")


def small_pipeline(shape: Shape, texts: Iterable[str], seed: int) -> Any:
    """Return a `StableDiffusionInstructPix2PixPipeline` with seeded random weights, without changing global random states.

    Args:
        texts: texts whose words become single tokens. Other words are spelled in letters or parts of these words.
        seed: the seed of all weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        words = _tokenizer(texts)
        return StableDiffusionInstructPix2PixPipeline(
            vae=_autoencoder(shape),
            text_encoder=_text_encoder(words),
            tokenizer=words,
            unet=_unet(shape),
            scheduler=_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def _autoencoder(shape: Shape) -> AutoencoderKL:
    autoencoder = AutoencoderKL(
        block_out_channels=shape.autoencoder_channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=CODEC_GROUPS,
        sample_size=shape.resolution,
        mid_block_add_attention=False,
    )
    begin_linear(autoencoder)
    return autoencoder


def _unet(shape: Shape) -> UNet2DConditionModel:
    levels = len(shape.channels)
    unet = UNet2DConditionModel(
        sample_size=shape.resolution // 2,
        in_channels=2 * LATENTS,
        out_channels=LATENTS,
        block_out_channels=shape.channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=tuple(max(1, width // HEAD) for width in shape.channels),  # here: the number of heads
        norm_num_groups=GROUPS,
    )
    begin_copying(unet)
    return unet


def _scheduler() -> DDIMScheduler:
    """Return a scheduler for predicting the noise-free sample: keeping a photograph is then the same task at all timesteps.

    The last timestep is pure noise, and sampling starts there.
    """
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        prediction_type="sample",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def _text_encoder(words: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModel(config).eval()


def _tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """Return CLIP's tokenizer with a vocabulary of letters, digits, signs and the texts' words, merged letter by letter."""
    signs = [chr(code) for code in range(ord("!"), ord("~") + 1) if not chr(code).isupper()]
    pieces, merges = [*signs, *(f"{sign}</w>" for sign in signs)], []
    for word in sorted({word for text in texts for word in text.lower().split() if word.isascii() and word.isalpha()}):
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
            pieces.append(parts[0])
    names = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
        (Path(folder) / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)
