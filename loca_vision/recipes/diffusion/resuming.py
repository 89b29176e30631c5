"""Which checkpoint a run goes on from, and whether it is of the same run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loca_vision.recipes.diffusion.checks import differences
from loca_vision.recipes.diffusion.settings import Recipe
from loca_vision.recipes.settings.command_line import as_json_dict
from loca_vision.storage.run_checkpoint import latest_checkpoint


def settings_in(path: Path, state: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint.

    Args:
        recipe: of the run that is to go on from it.

    Raises:
        ValueError: another trainer wrote it.
    """
    settings = state.get("recipe")
    if not isinstance(settings, dict) or recipe.MARK not in settings or "taken" not in state:
        raise ValueError(f"{path}: it is a checkpoint, but not of {recipe.WHAT} by this version")
    return settings


def checkpoint_of(recipe: Recipe) -> Path | None:
    """The checkpoint that a recipe goes on from; None where it does not, or where it is the latest of none.

    A mere name, such as checkpoint-500, is one in the output folder, as for diffusers' scripts, unless it is here.

    Raises:
        FileNotFoundError: it names one that is not there.
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
    """As JSON, but for the token, which nobody else may see."""
    return as_json_dict(recipe) | {"hub_token": None}


def check_same_samples(place: Path, before: Mapping[str, str] | None, now: Mapping[str, str], noun: str) -> None:
    """
    Args:
        place: what a run left, for the sentence.
        before, now: digests of columns; None was written by an earlier version.
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
    """
    Args:
        path, state: of the checkpoint that a run is to go on from.

    Raises:
        ValueError: another trainer wrote it, or a run with other settings.
    """
    for difference in differences(recipe, settings_in(path, state, recipe), saved_settings(recipe)):
        raise ValueError(f"{path}: the run there has other settings: {difference}")
