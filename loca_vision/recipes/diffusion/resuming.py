"""The checkpoint that a run continues from, and the check that it is of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loca_vision.recipes.diffusion.checks import differences
from loca_vision.recipes.diffusion.settings import Recipe
from loca_vision.recipes.settings.command_line import as_json_dict
from loca_vision.storage.run_checkpoint import latest_checkpoint


def settings_in(path: Path, state: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the settings of the run that wrote a checkpoint.

    Args:
        recipe: the recipe of the run that will continue from it.

    Raises:
        ValueError: another trainer wrote it.
    """
    settings = state.get("recipe")
    if not isinstance(settings, dict) or recipe.MARK not in settings or "taken" not in state:
        raise ValueError(f"{path}: it is a checkpoint, but not of {recipe.WHAT} by this version")
    return settings


def checkpoint_of(recipe: Recipe) -> Path | None:
    """Return the checkpoint that a recipe continues from; None if it starts anew, or from the latest and there is none.

    A mere name, such as checkpoint-500, means one in the output folder, as in diffusers' scripts, unless it exists here.

    Raises:
        FileNotFoundError: the recipe names one that does not exist.
    """
    if recipe.resume_from_checkpoint in (None, "latest"):
        return latest_checkpoint(recipe.output_dir) if recipe.resume_from_checkpoint else None
    path = Path(str(recipe.resume_from_checkpoint)).expanduser()
    if not path.is_dir() and len(path.parts) == 1 and (recipe.output_dir / path).is_dir():
        return recipe.output_dir / path
    if not path.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint={str(path)!r}: there is no such folder")
    return path


def saved_settings(recipe: Recipe) -> dict[str, Any]:
    """Return the settings as JSON, without the token, which must stay secret."""
    return as_json_dict(recipe) | {"hub_token": None}


def check_same_samples(place: Path, before: Mapping[str, str] | None, now: Mapping[str, str], noun: str) -> None:
    """Check that a run continues with the samples that it began with.

    Args:
        place: what a run left behind, for the error message.
        before, now: digests of columns; None if an earlier version wrote the run.
        noun: what the samples are called.

    Raises:
        ValueError: the samples are not those that the run began with.
    """
    changed = [column for column in now if before is not None and before.get(column) != now[column]]
    if changed:
        raise ValueError(
            f"{place}: the run there began with other {noun}: texts, or names or sizes of files, differ in "
            f"{', '.join(changed)}; put the {noun} back, or start a new run in another folder"
        )


def check_same_settings(path: Path, state: Mapping[str, Any], recipe: Recipe) -> None:
    """Check that a checkpoint is of a run with the same settings.

    Args:
        path, state: the checkpoint that a run will continue from.

    Raises:
        ValueError: another trainer wrote it, or a run with other settings.
    """
    for difference in differences(recipe, settings_in(path, state, recipe), saved_settings(recipe)):
        raise ValueError(f"{path}: the run there has other settings: {difference}")
