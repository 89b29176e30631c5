"""Check the settings of a diffusion trainer before anything is read, and fill in their defaults."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any, TypeVar

import torch

from loca_vision.checks import check_count, check_share, is_finite
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.recipes.diffusion.denoising import min_snr_weights
from loca_vision.recipes.diffusion.quantised import check_quantization
from loca_vision.recipes.diffusion.settings import METHODS, PHASES, Recipe
from loca_vision.recipes.settings.adapter_dtype import check_adapter_dtype
from loca_vision.recipes.settings.command_line import as_json_dict
from loca_vision.recipes.settings.method_settings import as_assignments, assigned
from loca_vision.recipes.training.first_locations import check_location_init, spent_on_locations

R = TypeVar("R", bound=Recipe)

# Settings that may differ between a run and its continuation.
MAY_DIFFER_ON_RESUME = {
    "output_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "report_to", "logging_dir",
    "push_to_hub", "hub_model_id", "hub_private", "hub_token", "config", "preset", "imports", "dataloader_num_workers",
    "cache_dir", "check_images", "cache_latents", "latents_dir", "adapter_dtype", "gradient_checkpointing",
    "train_batch_size", "gradient_accumulation_steps",  # their product with the processes, `batch_of`, is compared
}  # fmt: skip
_LENGTH = {"max_train_steps", "num_train_epochs"}  # these may differ too, if the rates do not depend on them
_NONE = torch.zeros(0)  # for calling functions of samples only to check settings

# Whole numbers, and the smallest value of each.
_COUNTS = {
    "resolution": 1, "train_batch_size": 1, "num_train_epochs": 1, "gradient_accumulation_steps": 1,
    "num_validation_images": 1, "validation_epochs": 1, "validation_inference_steps": 1, "checkpointing_steps": 1,
    "lr_warmup_steps": 0, "dataloader_num_workers": 0, "location_batches": 1,
}  # fmt: skip
_MAYBE = {
    "max_train_samples": 1, "max_train_steps": 1, "validation_steps": 1, "checkpoints_total_limit": 1, "seed": 0,
    "seed_locations": 0,
}  # fmt: skip


def check_given(recipe: Recipe, given: Collection[str]) -> None:
    """Refuse settings that contradict each other.

    Args:
        given: the fields that the user has set; those of another method are refused.

    Raises:
        ValueError: there is a contradiction; the error is one sentence.
    """
    METHODS.check(recipe.method, given)
    if recipe.together and recipe.learning_steps == 0:
        raise ValueError("--together moves locations, and learning_steps=0 keeps them from moving: choose one")
    check_location_init(recipe.location_init, given)
    if "cache_latents" in given and recipe.cache_latents and not recipe.center_crop:
        raise ValueError("--cache_latents: latents of random crops cannot be kept; say --center_crop too")
    if "ema_decay" in given and not recipe.use_ema:
        raise ValueError(f"ema_decay={recipe.ema_decay}: say --use_ema too")
    for name in ("hub_model_id", "hub_private", "hub_token"):
        if getattr(recipe, name) and not recipe.push_to_hub:
            raise ValueError(f"--{name}: say --push_to_hub too")
    if recipe.hub_token is not None and recipe.report_to not in ("tensorboard", "none"):
        raise ValueError(
            f"--hub_token: with report_to={recipe.report_to!r} the command line goes to others, and the token with it; "
            "log in with `hf auth login` instead"
        )


def settled(recipe: R, given: Collection[str]) -> R:
    """Return the recipe with the method's settings instead of None and expanded paths; random crops turn off cached latents."""
    usual = METHODS.defaults(recipe.method, METHODS.chosen(recipe.method, recipe))
    recipe = replace(recipe, **{name: value for name, value in usual.items() if getattr(recipe, name) is None})
    own = as_assignments(assigned(recipe.set))
    recipe = replace(recipe, set=own, imports=tuple(dict.fromkeys(recipe.imports)))
    if "validation_epochs" in given and "validation_steps" not in given:  # the latter may be a preset's
        recipe = replace(recipe, validation_steps=None)
    recipe = replace(recipe, cache_latents=recipe.cache_latents and recipe.center_crop)
    paths = {name: value for name, value in vars(recipe).items() if hasattr(value, "expanduser")}
    return replace(recipe, **{name: path.expanduser() for name, path in paths.items()})


def check_values(recipe: Recipe) -> None:
    """Refuse numbers out of range, missing packages, and settings that the method does not accept.

    Raises:
        ValueError: a setting is refused; the error is one sentence.
    """
    for name, least in (_COUNTS | _MAYBE).items():
        if name in _COUNTS or getattr(recipe, name) is not None:
            check_count(name, getattr(recipe, name), least)
    if recipe.seed is not None and recipe.seed >= 2**32:
        raise ValueError(f"seed={recipe.seed}: expected a seed below 2^32, as numpy's are")
    check_rates(recipe, ("learning_rate", "location_lr", "adam_weight_decay"), or_zero=True)
    check_rates(recipe, ("adam_epsilon", "max_grad_norm"), or_zero=False)
    for name in ("adam_beta1", "adam_beta2"):
        check_share(name, getattr(recipe, name), open_end=True)
    check_share("ema_decay", recipe.ema_decay)
    for scale in recipe.validation_scales:
        if not is_finite(scale):
            raise ValueError(f"validation_scales={scale!r}: expected a finite number")
    if recipe.snr_gamma is not None:
        min_snr_weights(_NONE, recipe.snr_gamma, "epsilon")
    if recipe.max_train_steps is not None:
        spent_on_locations(recipe.location_init, recipe.location_batches, recipe.max_train_steps, "the run")
    _check_installed(recipe)
    check_adapter_dtype(recipe.adapter_dtype, adapter_of(recipe))


def check_rates(recipe: Recipe, names: Collection[str], *, or_zero: bool) -> None:
    """Check that these settings are finite numbers above 0 or, with `or_zero`, from 0 up.

    Raises:
        ValueError: one of them is not.
    """
    for name in names:
        value = getattr(recipe, name)
        if not is_finite(value) or value < 0 or (value == 0 and not or_zero):
            raise ValueError(f"{name} must be a finite number {'from 0 up' if or_zero else 'above 0'}, got {value!r}")


def _check_installed(recipe: Recipe) -> None:
    """Check for optional packages before models are loaded, which takes a while."""
    for name, library in (("use_8bit_adam", "bitsandbytes"), ("enable_xformers_memory_efficient_attention", "xformers")):
        if getattr(recipe, name) and find_spec(library) is None:
            raise ValueError(f"--{name}: it needs {library}; python -m pip install {library}")
    if recipe.quantization is not None:
        check_quantization(recipe.quantization)


def adapter_of(recipe: Recipe) -> AdapterConfig:
    """Return the config to inject."""
    seed = recipe.seed if recipe.seed_locations is None else recipe.seed_locations
    config = METHODS.config(recipe, seed or 0)
    assert config is not None
    return config


def phases_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of the alternating schedule."""
    return {name: getattr(recipe, name) for name in PHASES}


def batch_of(recipe: Recipe, processes: int) -> int:
    """Return the number of samples in each optimiser step, of all processes together."""
    return recipe.train_batch_size * recipe.gradient_accumulation_steps * processes


def differences(recipe: Recipe, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return sentences about the settings that differ from those of the run to be continued."""
    passed = MAY_DIFFER_ON_RESUME | {
        field.name for field in fields(recipe) if field.name.startswith(("validation_", "num_validation_"))
    }
    if recipe.lr_scheduler.startswith("constant"):
        passed |= _LENGTH
    before = as_json_dict(type(recipe)("")) | saved  # earlier versions had fewer settings
    names = [field.name for field in fields(recipe) if field.name not in passed]
    return [f"{name}={now[name]!r}, {before.get(name)!r} before" for name in names if before.get(name) != now[name]]
