"""The pipeline in InstructPix2Pix training, the adapter in its UNet, and what is trained."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from loca_vision.model.conv_in import widen_conv_in
from loca_vision.model.inject import inject
from loca_vision.model.schedule import parameter_groups
from loca_vision.recipes.diffusion.checks import adapter_of
from loca_vision.recipes.diffusion.families.by_pipeline import EDITING
from loca_vision.recipes.diffusion.families.family import Family
from loca_vision.recipes.diffusion.models import NAME, Models, denoising_of, dtype_of, freeze, prepare_denoiser
from loca_vision.recipes.editing.pipeline import pipeline_of
from loca_vision.recipes.editing.recipe import EditRecipe


class EditModels(Models):
    """A pipeline on its device, frozen except for the adapter and, with --train_conv_in, the first convolution.

    Args:
        recipe: a settled recipe.
        accelerator: gives device and precision. Frozen weights are kept in that precision; what is trained is float32.

    Attributes:
        pipe: an InstructPix2Pix pipeline, with Stable Diffusion 1, 2 or XL.

    Raises:
        OSError: the pipeline is not available.
        ValueError: it is not an InstructPix2Pix pipeline, or the adapter or the resolution does not fit it.
    """

    recipe: EditRecipe

    def __init__(self, recipe: EditRecipe, accelerator: Accelerator) -> None:
        dtype = dtype_of(accelerator)
        pipe = pipeline_of(
            recipe.pretrained_model_name_or_path,
            revision=recipe.revision,
            variant=recipe.variant,
            cache_dir=recipe.cache_dir,
            quantization=recipe.quantization,
            dtype=dtype,
        )
        kind = EDITING[type(pipe).__name__]
        family = kind(pipe, denoising_of(pipe, recipe))
        _check_texts(recipe, family)
        _check_resolution(recipe, pipe)
        freeze(pipe, family, accelerator.device, dtype, quantised=recipe.quantization is not None)
        _adapt(pipe.unet, recipe)
        super().__init__(recipe, family)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        of = self.recipe
        return parameter_groups(
            self.pipe.unet, lr=rate, location_lr=of.location_lr, head_lr=of.conv_in_lr, weight_decay=of.adam_weight_decay
        )

    def counts(self) -> dict[str, int]:
        """Return the counts of trained numbers: of the adapter, its locations, and the first convolution."""
        whole = sum(p.numel() for p in self.pipe.unet.conv_in.parameters() if p.requires_grad)
        return super().counts() | {"conv_in_parameters": whole}


def _check_texts(recipe: EditRecipe, family: Family) -> None:
    """Check that the UNet takes the output of the pipeline's text encoders, and nothing more."""
    config: Any = family.model.config
    encoders = [getattr(family.pipe, name) for name in family.text_encoders]
    width = sum(encoder.config.hidden_size for encoder in encoders if encoder is not None)
    if config.addition_embed_type != ("text_time" if family.sized else None) or config.cross_attention_dim != width:
        raise ValueError(
            f"{recipe.pretrained_model_name_or_path}: its UNet takes more than texts of width {width}, which its text encoders "
            "give: Stable Diffusion 1, 2 and XL can be trained so, and others cannot"
        )


def _check_resolution(recipe: EditRecipe, pipe: Any) -> None:
    factor = pipe.vae_scale_factor
    if recipe.resolution % factor:
        raise ValueError(f"resolution must be a multiple of {factor}, as the autoencoder's, got {recipe.resolution}")


def _adapt(unet: nn.Module, recipe: EditRecipe) -> None:
    config: Any = unet.config
    latents = config.out_channels
    if config.in_channels == latents and not recipe.train_conv_in:
        raise ValueError(
            f"{recipe.pretrained_model_name_or_path}: its UNet takes {latents} channels, and sees no image to edit; "
            "--train_conv_in widens it and trains the first convolution too"
        )
    if config.in_channels not in (latents, 2 * latents):
        raise ValueError(
            f"{recipe.pretrained_model_name_or_path}: its UNet takes {config.in_channels} channels; "
            f"{2 * latents} are noise and image, and {latents} noise alone"
        )
    widen_conv_in(unet, 2 * latents)
    prepare_denoiser(unet, recipe)
    if recipe.train_conv_in:
        unet.conv_in.float()
    inject(unet, adapter_of(recipe), NAME, modules_to_save=("conv_in",) if recipe.train_conv_in else ())
