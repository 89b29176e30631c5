"""Flux.1 and Flux.2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from loca_vision.recipes.diffusion.families.family import Call, Family, Texts, output_of


class _Packed(Family):
    """A transformer whose latents are a sequence of patches of two by two."""

    denoiser: ClassVar[str] = "transformer"
    flow: ClassVar[bool] = True
    usual_length: ClassVar[int | None] = 512

    @property
    def divisor(self) -> int:
        return 2 * super().divisor

    def _guidance(self, noisy: Tensor) -> Tensor | None:
        """Return the guidance for a model that has learned guided predictions: (b,); None for others."""
        if not self.model.config.guidance_embeds:  # type: ignore[union-attr]
            return None
        return noisy.new_full((len(noisy),), self.guidance_scale)


class Flux(_Packed):
    """Flux.1: a T5 for the text, and the pooled state of a CLIP."""

    text_encoders: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

    def lengths(self) -> dict[str, int]:
        """Return T5's length, because only a summary of CLIP is used."""
        assert self.length is not None
        return {"tokenizer_2": self.length}

    def encode(self, prompts: list[str]) -> Texts:
        text, pooled, _ = self.pipe.encode_prompt(
            prompts, None, device=self._device(), num_images_per_prompt=1, max_sequence_length=self.length
        )
        return {"text": text, "pooled": pooled}

    def predict(self, model: Call, noisy: Tensor, timesteps: Tensor, texts: Texts, sizes: Tensor | None) -> Tensor:
        count, channels, height, width = noisy.shape
        factor = self.pipe.vae_scale_factor
        ids = self.pipe._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype)
        answer = model(
            hidden_states=self.pipe._pack_latents(noisy, count, channels, height, width),
            timestep=timesteps / 1000,
            guidance=self._guidance(noisy),
            pooled_projections=texts["pooled"],
            encoder_hidden_states=texts["text"],
            txt_ids=noisy.new_zeros(texts["text"].shape[1], 3),
            img_ids=ids,
        )
        unpacked: Tensor = self.pipe._unpack_latents(output_of(answer), height * factor, width * factor, factor)
        return unpacked


class Flux2(_Packed):
    """Flux.2 and its klein: hidden states of a language model, and patches of latents with mean 0 and deviation 1."""

    text_names: ClassVar[tuple[str, ...]] = ("text",)
    trainable: ClassVar[tuple[str, ...]] = ()

    def encode(self, prompts: list[str]) -> Texts:
        text, _ = self.pipe.encode_prompt(
            prompts, device=self._device(), num_images_per_prompt=1, max_sequence_length=self.length
        )
        return {"text": text}

    def token_counts(self, tokenizer: str, prompts: Sequence[str]) -> list[int]:
        """Count tokens including the conversation template in which the language model gets a text."""
        read, system = getattr(self.pipe, tokenizer), getattr(self.pipe, "system_message", None)
        count = _tokens_of_klein if system is None else partial(_tokens_of_flux2, system=system)
        return [count(read, text) for text in prompts]

    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        channels, height, width = shape
        return (4 * channels, height // 2, width // 2)

    def latents(self, moments: Tensor, posterior: Tensor) -> Tensor:
        """Return the mode, as in diffusers' scripts: nothing is sampled."""
        vae = self.pipe.vae
        patches: Tensor = self.pipe._patchify_latents(moments[:, 0])
        mean, variance = (value.view(1, -1, 1, 1).to(patches) for value in (vae.bn.running_mean, vae.bn.running_var))
        normal: Tensor = (patches - mean) / torch.sqrt(variance + vae.config.batch_norm_eps)
        return normal

    def predict(self, model: Call, noisy: Tensor, timesteps: Tensor, texts: Texts, sizes: Tensor | None) -> Tensor:
        answer = model(
            hidden_states=self.pipe._pack_latents(noisy),
            timestep=timesteps / 1000,
            guidance=self._guidance(noisy),
            encoder_hidden_states=texts["text"],
            txt_ids=self.pipe._prepare_text_ids(texts["text"]).to(noisy.device),
            img_ids=self.pipe._prepare_latent_ids(noisy).to(noisy.device),
        )
        return output_of(answer).transpose(1, 2).reshape(noisy.shape)


def _tokens_of_klein(tokenizer: Any, text: str) -> int:
    said = [{"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return len(tokenizer(whole, truncation=False, verbose=False).input_ids)


def _tokens_of_flux2(processor: Any, text: str, *, system: str) -> int:
    spoken = (("system", system), ("user", text))
    said = [{"role": role, "content": [{"type": "text", "text": words}]} for role, words in spoken]
    tokens = processor.apply_chat_template(said, tokenize=True, return_dict=False, add_generation_prompt=False)
    return torch.as_tensor(tokens).numel()  # a processor returns a batch even for a single text
