"""The files of a finished classifier run, in its folder or in a repository on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loca_vision.data.pair_sources import is_missing
from loca_vision.messages import one_line
from loca_vision.methods.registry import unknown_method
from loca_vision.recipes.classification.presets import PRESETS
from loca_vision.recipes.classification.recipe import Recipe
from loca_vision.recipes.classification.recipe_groups import METHODS
from loca_vision.recipes.reports.metrics import METRICS, read_metrics
from loca_vision.recipes.settings.command_line import parse

SETTINGS = "config.yaml"


def run_folder(adapter: str) -> Path:
    """Return a folder as it is; for a repository on the hub, download the run's files and return their folder.

    Raises:
        FileNotFoundError: there is neither.
    """
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FileNotFoundError(f"{adapter}: expected the folder of a run, got a file")
    if is_missing(adapter):
        raise FileNotFoundError(
            f"{adapter}: there is no such folder; it is neither the folder of a run nor a repository of the hub, user/name"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(adapter, allow_patterns=["*.safetensors", SETTINGS, METRICS]))
    except (OSError, ValueError) as error:  # no network, or no such repository
        raise FileNotFoundError(
            f"{adapter}: there is no such folder, and no such repository can be read from the hub ({one_line(error, 200)})"
        ) from error


def recipe_of(folder: Path) -> Recipe:
    """Return the settings of the run, read as strictly as a user's; no code that they name is imported.

    Raises:
        FileNotFoundError, ValueError: the settings are missing or wrong.
    """
    file = folder / SETTINGS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; train-classifier writes it next to the adapter")
    recipe = parse(Recipe, ["--config", str(file)], prog="evaluate.py", presets=PRESETS, importing=False).settings
    if recipe.method not in METHODS.known():
        raise ValueError(f"{file}: {unknown_method(recipe.method, METHODS.known())}")
    return recipe


def metrics_of(folder: Path) -> dict[str, Any]:
    """Return the measurements of a single run, and its classes.

    Raises:
        FileNotFoundError, ValueError: they are missing or wrong, or of several seeds.
    """
    metrics = read_metrics(folder)
    if "seeds" in metrics:
        raise ValueError(f"{folder}: expected the folder of one run, got one of several seeds; name one of them, as seed-...")
    classes = metrics.get("classes")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{folder / METRICS}: expected the names of the classes, got {one_line(classes, 100)}")
    return metrics
