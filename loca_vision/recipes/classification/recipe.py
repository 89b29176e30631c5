"""The settings for fine-tuning an image classifier, as one dataclass, and which of them contradict each other."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from loca_vision.checks import check_count, check_share, is_finite, is_whole
from loca_vision.data.load import EVERYWHERE
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.recipes.classification.presets import PRESETS
from loca_vision.recipes.classification.recipe_groups import METHODS, Data, Method, Model, Optimisation, Reports, RunFolder
from loca_vision.recipes.settings.adapter_dtype import check_adapter_dtype
from loca_vision.recipes.settings.method_settings import as_assignments, assigned
from loca_vision.recipes.training.first_locations import check_location_init


@dataclass(frozen=True)
class Recipe(Reports, RunFolder, Optimisation, Method, Model, Data):  # the fields of the last base come first
    """Fine-tune an image classifier of timm with LoCA or another method, train all of it (full), or its head alone (lp).

    None stands for the default of the method, the model or the data set.
    """

    FIRST: ClassVar[tuple[str, ...]] = (
        "dataset", "root", "model", "method", "n_components", "preset", "epochs", "batch_size", "lr", "output_dir",
    )  # fmt: skip

    config: Path | None = None
    """A YAML file of these settings; every run writes one."""


_RATES = {"full": {"lr": 5e-5, "head_lr": 1e-3}, "lp": {"head_lr": 1e-2}}  # common values: the paper gives none
DEFAULT_BATCH = 128
# Settings that earlier versions lacked, with the values that they had in effect.
EARLIER: dict[str, Any] = {
    "set": [], "layers": [], "label_smoothing": 0.0, "mixup": 0.0, "class_weights": "none", "adapter_dtype": "float32",
    "location_init": "uniform", "location_batches": 16, "location_rule": "largest", "head": None,
}  # fmt: skip
# Settings that may differ between a run and its continuation.
MAY_DIFFER_ON_RESUME = {
    "output_dir", "resume", "checkpoint_steps", "keep_checkpoints", "report_to", "push_to_hub", "hub_model_id", "hub_private",
    "config", "preset", "workers", "seeds", "download", "imports", "check_images",
}  # fmt: skip


def resolve(recipe: Recipe, given: Collection[str]) -> Recipe:
    """Return the recipe with the method's own settings instead of None, after every check that needs no file.

    Args:
        given: the fields that the user has set; those of another method are refused.

    Raises:
        ValueError: a value is out of range, or settings contradict each other; the error is one sentence.
    """
    _check_contradictions(recipe, given)
    missing = {name: value for name, value in _defaults(recipe.method).items() if getattr(recipe, name) is None}
    own = as_assignments(assigned(recipe.set))
    recipe = replace(recipe, **missing, set=own, imports=tuple(dict.fromkeys(recipe.imports)))
    _check_numbers(recipe)
    check_adapter_dtype(recipe.adapter_dtype, adapter_config(recipe, recipe.seed))
    return recipe


def with_batch_size(recipe: Recipe, images: int, processes: int) -> Recipe:
    """Return the recipe with a batch size: the user's, or 128, or as many images as there are to train on.

    Raises:
        ValueError: there are too few images for the parts of a batch and the processes.
    """
    if recipe.batch_size is not None:
        return recipe
    shares = recipe.accumulate * processes
    size = min(DEFAULT_BATCH, images) // shares * shares
    if not size:
        raise ValueError(
            f"accumulate={recipe.accumulate}: in {processes} processes, it must be at most the number of training images, "
            f"got {images}"
        )
    return replace(recipe, batch_size=size)


def adapter_config(recipe: Recipe, seed: int) -> AdapterConfig | None:
    """Return the config to inject; None for full training and the linear probe."""
    return METHODS.config(recipe, seed)


def _defaults(method: str) -> dict[str, Any]:
    config = METHODS.adapter(method)
    if config is None:
        return _RATES[method]
    return METHODS.defaults(method, {}) | {"lr": config.lr, "head_lr": config.head_lr}


def _check_contradictions(recipe: Recipe, given: Collection[str]) -> None:
    METHODS.check(recipe.method, given)
    if recipe.preset is not None and PRESETS[recipe.preset]["method"] != recipe.method:
        method = PRESETS[recipe.preset]["method"]
        raise ValueError(f"preset={recipe.preset!r} is for the method {method}, and --method says {recipe.method}")
    if recipe.together and recipe.learning_steps == 0:
        raise ValueError("--together moves locations, and learning_steps=0 keeps them from moving: choose one")
    check_location_init(recipe.location_init, given)
    _check_cached(recipe)
    if "seed" in given and recipe.seeds:
        raise ValueError(f"--seed {recipe.seed} and --seeds contradict each other: choose one")
    if recipe.dataset in EVERYWHERE and recipe.root:
        raise ValueError(f"root={str(recipe.root)!r}: the {recipe.dataset} need none; say --dataset for a set of your own")
    if recipe.push_to_hub and recipe.seeds:
        raise ValueError("--push_to_hub uploads one run, and --seeds are several: choose one")
    for name in ("hub_model_id", "hub_private"):
        if getattr(recipe, name) and not recipe.push_to_hub:
            raise ValueError(f"{name}={getattr(recipe, name)!r}: say --push_to_hub too")


def _check_cached(recipe: Recipe) -> None:
    changing = {"augment": recipe.augment not in (None, "none"), "mixup": bool(recipe.mixup)}
    for name in [name for name, changes in changing.items() if changes and recipe.cache_features]:
        raise ValueError(
            f"--cache_features computes features once, and {name}={getattr(recipe, name)!r} changes them every epoch"
        )
    if recipe.cache_features and recipe.checkpointing:
        raise ValueError("--cache_features and --checkpointing contradict each other: choose one")


# Whole numbers, and the smallest value of each.
_COUNTS = {
    "epochs": 1, "accumulate": 1, "location_batches": 1, "keep_checkpoints": 1, "warmup_steps": 0, "split_seed": 0, "seed": 0,
}  # fmt: skip
_MAYBE = {
    "batch_size": 1, "train_images": 1, "validation_images": 1, "test_images": 1, "image_size": 1, "early_stop": 1,
    "checkpoint_steps": 1, "workers": 0,
}  # fmt: skip


def _check_numbers(recipe: Recipe) -> None:
    for name, least in (_COUNTS | _MAYBE).items():
        if name in _COUNTS or getattr(recipe, name) is not None:
            check_count(name, getattr(recipe, name), least)
    for name in ("lr", "location_lr", "head_lr", "weight_decay", "mixup"):
        if name == "lr" and recipe.method == "lp":
            continue
        if not is_finite(getattr(recipe, name)) or getattr(recipe, name) < 0:
            raise ValueError(f"{name}={getattr(recipe, name)!r}: expected a finite number from 0 up")
    check_share("label_smoothing", recipe.label_smoothing, open_end=True)
    if recipe.clip is not None and not (is_finite(recipe.clip) and recipe.clip > 0):
        raise ValueError(f"clip={recipe.clip!r}: expected a finite number above 0")
    batch_size = recipe.batch_size or DEFAULT_BATCH
    if batch_size % recipe.accumulate:
        raise ValueError(f"accumulate={recipe.accumulate}: it does not divide batch_size={batch_size}")
    if recipe.seed >= 2**32:
        raise ValueError(f"seed={recipe.seed}: expected a seed below 2^32, as numpy's are")
    if len(set(recipe.seeds)) < len(recipe.seeds) or not all(is_whole(seed) and 0 <= seed < 2**32 for seed in recipe.seeds):
        raise ValueError(f"seeds={recipe.seeds!r}: different whole numbers from 0 up, below 2^32")


def differences(recipe: Recipe, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return sentences about the settings that differ from those of the run to be continued."""
    saved = EARLIER | saved
    names = [field.name for field in fields(recipe) if field.name not in MAY_DIFFER_ON_RESUME]
    return [f"{name}={now[name]!r}, {saved.get(name)!r} before" for name in names if saved.get(name) != now[name]]
