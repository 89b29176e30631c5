"""A pipeline in training: frozen except for its adapters, with the optimiser over these and the counts of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from loca_vision.model.schedule import parameter_groups
from loca_vision.model.traversal import all_updates
from loca_vision.recipes.diffusion.denoising import Denoising
from loca_vision.recipes.diffusion.encoders import Encoders
from loca_vision.recipes.diffusion.families.family import Family, Texts
from loca_vision.recipes.diffusion.settings import Recipe

NAME = "default"  # the adapter's name in the pipeline
_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def dtype_of(accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of the frozen weights.

    Raises:
        ValueError: accelerate is configured for an unsupported precision.
    """
    if accelerator.mixed_precision not in _DTYPES:
        raise ValueError(f"mixed_precision={accelerator.mixed_precision!r}: the choices are {', '.join(_DTYPES)}")
    return _DTYPES[accelerator.mixed_precision]


class Models:
    """A pipeline on its device, and the parts of it that are trained.

    Args:
        recipe: a settled recipe.
        family: the family of the pipeline, whose models are frozen already and have their adapters.
        encoding: names of text encoders that are trained too; none for the denoiser alone.

    Attributes:
        pipe: the pipeline.
        encoders: its autoencoder and text encoders.
        trained: the module whose parameters are trained: the denoiser, or denoiser and text encoders together.
    """

    def __init__(self, recipe: Recipe, family: Family, encoding: Sequence[str] = ()) -> None:
        self.recipe, self.family, self.pipe = recipe, family, family.pipe
        self.encoders = Encoders(family)
        self.encoding = {name: getattr(family.pipe, name) for name in encoding}
        self.trained: nn.Module = Together(family, self.encoding) if encoding else family.model

    def predict(
        self, model: Callable[..., Any], noisy: Tensor, timesteps: Tensor, texts: Texts | list[str], sizes: Tensor | None
    ) -> Tensor:
        """Return the prediction by `trained` or its gradient-sharing wrapper; texts are unencoded if encoders are trained."""
        if self.encoding:
            prediction: Tensor = model(noisy, timesteps, texts, sizes)
            return prediction
        assert isinstance(texts, Mapping)
        return self.family.predict(model, noisy, timesteps, texts, sizes)

    def optimizer(self, processes: int) -> Optimizer:
        """Return AdamW over what is trained, with each group at its rate."""
        of, rate = self.recipe, self.recipe.learning_rate
        if of.scale_lr:
            rate *= processes * of.gradient_accumulation_steps * of.train_batch_size
        groups = self.groups(rate)
        settings: dict[str, Any] = {"lr": rate, "betas": (of.adam_beta1, of.adam_beta2), "eps": of.adam_epsilon}
        if not of.use_8bit_adam:
            return AdamW(groups, **settings)
        from bitsandbytes.optim import AdamW8bit

        small: Optimizer = AdamW8bit(groups, **settings)
        return small

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Return the parameter groups of the denoiser and of each text encoder that is trained."""
        of = self.recipe
        return parameter_groups(self.family.model, lr=rate, location_lr=of.location_lr, weight_decay=of.adam_weight_decay)

    def counts(self) -> dict[str, int]:
        """Return the counts of trained numbers: of the adapters, and of their locations."""
        updates = all_updates(self.trained)
        return {
            "trained_parameters": sum(p.numel() for update in updates for p in update.trainable()),
            "location_parameters": sum(p.numel() for update in updates for p in update.location_parameters()),
        }


class Together(nn.Module):
    """Text encoders and denoiser as one module, so that processes share the gradients of both."""

    def __init__(self, family: Family, encoders: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.family = family
        self.add_module(family.denoiser, family.model)
        for name, model in encoders.items():
            self.add_module(name, model)

    def forward(self, noisy: Tensor, timesteps: Tensor, prompts: Sequence[str], sizes: Tensor | None) -> Tensor:
        """Encode the texts, and predict."""
        texts = self.family.texts(prompts)
        return self.family.predict(self.family.model, noisy, timesteps, texts, sizes)


def freeze(pipe: Any, family: Family, device: torch.device, dtype: torch.dtype, *, quantised: bool = False) -> None:
    """Freeze the models of a pipeline, and move them to a device and a dtype.

    Args:
        quantised: whether the denoiser is quantised, and has its dtype already.
    """
    for name in ("vae", *family.text_encoders, family.denoiser):
        model = getattr(pipe, name, None)
        if model is None:
            continue
        model.requires_grad_(False)
        # nn.Module's own method: that of diffusers warns about layers to keep in float32, and these models have none.
        if name == family.denoiser and quantised:
            nn.Module.to(model, device)
        else:
            nn.Module.to(model, device, torch.float32 if name == "vae" and family.keeps_vae_exact else dtype)


def prepare_denoiser(model: Any, recipe: Recipe) -> None:
    """Set up attention and checkpointing as in the recipe.

    Raises:
        ValueError: xformers does not work here.
    """
    if recipe.enable_xformers_memory_efficient_attention:
        try:
            model.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise ValueError(f"--enable_xformers_memory_efficient_attention: {' '.join(str(error).split())}") from error
    if recipe.gradient_checkpointing:
        model.enable_gradient_checkpointing()


def denoising_of(pipe: Any, recipe: Recipe) -> Denoising:
    """Return the noise process of Stable Diffusion 1, 2 or XL; the pipeline's scheduler is set to the recipe's prediction."""
    if recipe.prediction_type is not None:
        pipe.scheduler.register_to_config(prediction_type=recipe.prediction_type)
    return Denoising(DDPMScheduler.from_config(pipe.scheduler.config), recipe.snr_gamma)
