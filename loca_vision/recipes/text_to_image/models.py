"""The pipeline in text-to-image training, its adapters, and what is trained."""

from __future__ import annotations

from typing import Any

import diffusers
from accelerate import Accelerator
from diffusers import FlowMatchEulerDiscreteScheduler

from loca_vision.model.inject import inject
from loca_vision.model.schedule import parameter_groups
from loca_vision.recipes.diffusion.checks import adapter_of
from loca_vision.recipes.diffusion.families.by_pipeline import family_of
from loca_vision.recipes.diffusion.families.family import Family, Process
from loca_vision.recipes.diffusion.families.stable_diffusion_3 import StableDiffusion3
from loca_vision.recipes.diffusion.flow import Flow
from loca_vision.recipes.diffusion.loading import source_of
from loca_vision.recipes.diffusion.models import NAME, Models, denoising_of, dtype_of, freeze, prepare_denoiser
from loca_vision.recipes.text_to_image.recipe import ImageRecipe

_OF_DENOISING = {"snr_gamma": None, "prediction_type": None, "noise_offset": 0.0}  # with their values when nobody sets them
_OF_FLOW = {"weighting_scheme": None, "precondition_outputs": None}


class ImageModels(Models):
    """A pipeline on its device, frozen but for the adapters in its denoiser and, with --train_text_encoder, its text encoders.

    Args:
        recipe: a settled recipe.
        accelerator: gives device and precision. Frozen weights are kept in that precision; what is trained is float32.

    Raises:
        OSError: the pipeline is not available.
        ValueError: the pipeline cannot be trained here, or a setting does not fit it.
    """

    recipe: ImageRecipe

    def __init__(self, recipe: ImageRecipe, accelerator: Accelerator) -> None:
        dtype = dtype_of(accelerator)
        source = source_of(recipe, "a text-to-image pipeline")
        name = source.class_name()
        kind = family_of(name, source.name)
        _check_process(recipe, kind, source.name)
        more = {"add_watermarker": False} if "XL" in name else {}
        pipe = source.load(_class(name, source.name), kind, dtype, recipe.quantization, **more)
        family = _family(kind, pipe, recipe)
        encoding = _encoders_to_train(recipe, family)
        freeze(pipe, family, accelerator.device, dtype, quantised=recipe.quantization is not None)
        prepare_denoiser(family.model, recipe)
        inject(family.model, adapter_of(recipe), NAME)
        for encoder in encoding:
            _prepare_encoder(getattr(pipe, encoder), recipe)
        super().__init__(recipe, family, encoding)

    def groups(self, rate: float) -> list[dict[str, Any]]:
        of = self.recipe
        groups = super().groups(rate)
        own = rate if of.text_encoder_lr is None else of.text_encoder_lr
        for name, model in self.encoding.items():
            of_one = parameter_groups(model, lr=own, location_lr=of.location_lr, weight_decay=of.adam_weight_decay)
            groups += [group | {"name": f"{name} {group.get('name', '')}".strip()} for group in of_one]
        return groups


def _class(name: str, place: str) -> Any:
    if not hasattr(diffusers, name):
        raise ValueError(f"{place}: diffusers {diffusers.__version__} has no {name}; a newer version has it")
    return getattr(diffusers, name)


def _check_process(recipe: ImageRecipe, kind: type[Family], place: str) -> None:
    """Refuse settings of the other kind of noise process."""
    for name, unset in (_OF_DENOISING if kind.flow else _OF_FLOW).items():
        if getattr(recipe, name) != unset:
            trained = "flow matching" if kind.flow else "denoising diffusion"
            raise ValueError(f"{name}={getattr(recipe, name)!r}: {place} is trained by {trained}, which has no such setting")


def _family(kind: type[Family], pipe: Any, recipe: ImageRecipe) -> Family:
    length = recipe.max_sequence_length
    if length is not None and kind.usual_length is None:
        raise ValueError(f"max_sequence_length={length}: the tokenizer of {type(pipe).__name__} decides")
    process = _process(kind, pipe, recipe)
    return kind(pipe, process, max_sequence_length=length, guidance_scale=recipe.guidance_scale)


def _process(kind: type[Family], pipe: Any, recipe: ImageRecipe) -> Process:
    if not kind.flow:
        return denoising_of(pipe, recipe)
    third = issubclass(kind, StableDiffusion3)
    return Flow(
        FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config),
        recipe.weighting_scheme or ("logit_normal" if third else "none"),
        recipe.logit_mean,
        recipe.logit_std,
        recipe.mode_scale,
        third if recipe.precondition_outputs is None else recipe.precondition_outputs,
    )


def _encoders_to_train(recipe: ImageRecipe, family: Family) -> tuple[str, ...]:
    if not recipe.train_text_encoder:
        return ()
    found = tuple(name for name in family.trainable if getattr(family.pipe, name, None) is not None)
    if not found:
        kind = type(family.pipe).__name__
        raise ValueError(f"--train_text_encoder: a {kind} has no text encoder that can be trained here")
    return found


def _prepare_encoder(model: Any, recipe: ImageRecipe) -> None:
    if recipe.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    inject(model, adapter_of(recipe), NAME)
