"""Stable Diffusion 1 and 2, and XL."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from loca_vision.recipes.diffusion.families.family import Call, Family, Texts, output_of


class StableDiffusion(Family):
    """Stable Diffusion 1 and 2: a UNet that sees the states of one text encoder."""

    text_names: ClassVar[tuple[str, ...]] = ("text",)

    def encode(self, prompts: list[str]) -> Texts:
        encode = getattr(self.pipe, "encode_prompt", None) or self.pipe._encode_prompt  # the latter in InstructPix2Pix
        found = encode(prompts, self._device(), 1, False)
        return {"text": found[0] if isinstance(found, tuple) else found}

    def predict(self, model: Call, noisy: Tensor, timesteps: Tensor, texts: Texts, sizes: Tensor | None) -> Tensor:
        return output_of(model(noisy, timesteps, texts["text"]))


class StableDiffusionXL(Family):
    """Stable Diffusion XL: two text encoders, and the size of an image and where it was cropped (Podell et al., 2023)."""

    text_encoders: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    trainable: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    keeps_vae_exact: ClassVar[bool] = True
    sized: ClassVar[bool] = True

    def encode(self, prompts: list[str]) -> Texts:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts, device=self._device(), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"text": text, "pooled": pooled}

    def latents(self, moments: Tensor, posterior: Tensor) -> Tensor:
        found, config = super().latents(moments, posterior), self.pipe.vae.config
        if (mean := getattr(config, "latents_mean", None)) is None or (deviation := config.latents_std) is None:
            return found
        mean, deviation = (found.new_tensor(values).view(1, -1, 1, 1) for values in (mean, deviation))  # of Playground 2.5
        moved: Tensor = (found - mean * config.scaling_factor) / deviation
        return moved

    def predict(self, model: Call, noisy: Tensor, timesteps: Tensor, texts: Texts, sizes: Tensor | None) -> Tensor:
        assert sizes is not None
        added = {"text_embeds": texts["pooled"], "time_ids": sizes}
        return output_of(model(noisy, timesteps, texts["text"], added_cond_kwargs=added))
