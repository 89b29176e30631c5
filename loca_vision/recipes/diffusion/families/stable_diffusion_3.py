"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from loca_vision.recipes.diffusion.families.family import Call, Family, Texts, output_of


class StableDiffusion3(Family):
    """A transformer that sees text and image as one sequence, and two CLIPs and a T5 (Esser et al., 2024)."""

    denoiser: ClassVar[str] = "transformer"
    text_encoders: ClassVar[dict[str, str]] = {
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
        "text_encoder_3": "tokenizer_3",
    }
    trainable: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    flow: ClassVar[bool] = True
    keeps_vae_exact: ClassVar[bool] = True
    usual_length: ClassVar[int | None] = 77

    @property
    def divisor(self) -> int:
        return int(self.pipe.vae_scale_factor * self.model.config.patch_size)  # type: ignore[union-attr]

    def lengths(self) -> dict[str, int]:
        """Return the length of T5, which alone reads texts beyond CLIP's length; without a T5, those of the CLIPs."""
        if getattr(self.pipe, "tokenizer_3", None) is not None and self.length:
            return {"tokenizer_3": self.length}
        return {name: int(getattr(self.pipe, name).model_max_length) for name in ("tokenizer", "tokenizer_2")}

    def encode(self, prompts: list[str]) -> Texts:
        text, _, pooled, _ = self.pipe.encode_prompt(
            prompts,
            prompts,
            prompts,
            device=self._device(),
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            max_sequence_length=self.length,
        )
        return {"text": text, "pooled": pooled}

    def predict(self, model: Call, noisy: Tensor, timesteps: Tensor, texts: Texts, sizes: Tensor | None) -> Tensor:
        answer = model(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=texts["text"], pooled_projections=texts["pooled"]
        )
        return output_of(answer)
