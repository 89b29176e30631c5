"""What training needs to know about an architecture: the denoiser's inputs from images and texts, and how to call it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loca_vision.recipes.diffusion.denoising import Denoising
from loca_vision.recipes.diffusion.errors import sampled
from loca_vision.recipes.diffusion.flow import Flow

Texts = dict[str, Tensor]
"""Encoded texts, by name; each (n, ...)."""
Process = Denoising | Flow
Call = Callable[..., Any]
"""A denoiser, or a wrapper that shares its gradients between processes."""


class Family:
    """One architecture, around a pipeline of it.

    Args:
        pipe: a text-to-image pipeline, or one of InstructPix2Pix.
        process: how noise is added, and what is to be predicted.
        max_sequence_length: length of the texts in tokens, for families in which it can be chosen; None for the usual one.
        guidance_scale: the guidance given in training to models that have learned guided predictions.

    Attributes:
        denoiser: the name of the component that predicts.
        text_names: names of the tensors that a text is encoded to.
        text_encoders: the names of the text encoders, each with its tokenizer's.
        trainable: the text encoders that adapters can be put in.
        flow: whether it is trained by flow matching.
        keeps_vae_exact: whether the autoencoder is kept in float32 because it overflows in half precision.
        sized: whether the denoiser is told the size of an image and where it was cropped.
        usual_length: how many tokens of a text are read by default, if that can be chosen; None if the tokenizer decides.
    """

    denoiser: ClassVar[str] = "unet"
    text_names: ClassVar[tuple[str, ...]] = ("text", "pooled")
    text_encoders: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer"}
    trainable: ClassVar[tuple[str, ...]] = ("text_encoder",)
    flow: ClassVar[bool] = False
    keeps_vae_exact: ClassVar[bool] = False
    sized: ClassVar[bool] = False
    usual_length: ClassVar[int | None] = None

    def __init__(
        self, pipe: Any, process: Process, *, max_sequence_length: int | None = None, guidance_scale: float = 3.5
    ) -> None:
        self.pipe, self.process, self.guidance_scale = pipe, process, guidance_scale
        self.length = max_sequence_length or self.usual_length

    @property
    def model(self) -> nn.Module:
        """The denoiser."""
        model: nn.Module = getattr(self.pipe, self.denoiser)
        return model

    @property
    def divisor(self) -> int:
        """The number that the sides of an image must be multiples of."""
        return int(self.pipe.vae_scale_factor)

    def call_settings(self) -> dict[str, Any]:
        """Return arguments that make the pipeline, when it draws, read texts as in training."""
        return {"max_sequence_length": self.length} if self.length else {}

    def texts(self, prompts: Sequence[str]) -> Texts:
        """Return the encoded texts for the denoiser, padded or truncated to the length that is read.

        The pipelines' warnings about each truncated text are silenced, since a run has reported once how many there are.
        """
        loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
        levels = [logger.level for logger in loggers]
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            return self.encode(list(prompts))
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)

    def encode(self, prompts: list[str]) -> Texts:
        """Encode `texts` with the pipeline's own method."""
        raise NotImplementedError

    def lengths(self) -> dict[str, int]:
        """Return how many tokens are read, by tokenizer, for those tokenizers that should read a whole text."""
        return {name: self.length or int(getattr(self.pipe, name).model_max_length) for name in self.text_encoders.values()}

    def token_counts(self, tokenizer: str, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each text has without truncation, including the tokenizer's special tokens."""
        read = getattr(self.pipe, tokenizer)
        return [len(tokens) for tokens in read(list(prompts), truncation=False, verbose=False).input_ids] if prompts else []

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return (c, h, w) of what is denoised, given the shape of the autoencoder's latents."""
        return tuple(shape)

    def latents(self, moments: Tensor, posterior: Tensor) -> Tensor:
        """Return what is denoised: a sample of the latents (b, 2, c, h, w), scaled as for the denoiser."""
        config = self.pipe.vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        factor: float = config.scaling_factor
        return (sampled(moments, posterior) - shift) * factor

    def predict(
        self, model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, texts: Texts, sizes: Tensor | None
    ) -> Tensor:
        """Return the denoiser's prediction, in the shape of the noisy latents (b, c, h, w).

        Args:
            model: the denoiser, or a wrapper that shares its gradients between processes.
            timesteps: (b,).
            texts: the result of `texts`.
            sizes: (b, 6): each image's original height and width, top and left of the crop, final height and width; for
                families with `sized`.
        """
        raise NotImplementedError

    def _device(self) -> torch.device:
        """Return the device of the text encoders."""
        name = next(iter(self.text_encoders))
        device: torch.device = next(getattr(self.pipe, name).parameters()).device
        return device


def output_of(answer: Any) -> Tensor:
    """Return the tensor in a diffusers model's output."""
    tensor: Tensor = answer[0] if isinstance(answer, tuple) else answer.sample
    return tensor
