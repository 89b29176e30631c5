"""Test a trained classifier again, from the files of its run: accuracy, a table of classes, a confusion matrix."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.data.transforms import Transformed
from loca_vision.formats.save_load import load_adapter
from loca_vision.messages import aligned
from loca_vision.recipes.classification.accuracy import accuracy_of, balanced_accuracy_of, confusion
from loca_vision.recipes.classification.images_to_test import ImagesToTest, images_to_test
from loca_vision.recipes.classification.models import ModelSpec, build_model, default_weights
from loca_vision.recipes.classification.recipe import Recipe, adapter_config
from loca_vision.recipes.classification.run_folder import metrics_of, recipe_of, run_folder
from loca_vision.recipes.classification.task import View, view_of, workers_of
from loca_vision.recipes.classification.trained_weights import TRAINED, load_trained
from loca_vision.recipes.reports.plots import draw_confusion
from loca_vision.recipes.settings.plugins import Imports, import_modules
from loca_vision.storage.atomic_file import write_atomically


@dataclass(frozen=True)
class Evaluate:
    """Test a classifier of train-classifier: the accuracy that the run printed, every class, and which classes are confused."""

    adapter: str
    """The run's folder, or a repository on the hub that contains one."""
    root: Path | None = None
    """Where the images are now, if elsewhere than in training."""
    weights: str | None = None
    """Where the base weights are now, if elsewhere."""
    batch_size: int = 64
    """Images per batch."""
    imports: Imports = ()
    """A module, by its name or as a .py file, that defines the adapter's method; may be repeated."""
    output: Path | None = None
    """Folder for evaluation.json and confusion.png; by default the run's folder."""


def evaluate(wanted: Evaluate) -> dict[str, Any]:
    """Test, write both files, and print the table.

    Raises:
        FileNotFoundError, ValueError, OSError: a file of the run is missing or not as it was written, or the images have other
            classes than the model.
    """
    import_modules(wanted.imports)
    folder = run_folder(wanted.adapter)
    recipe = recipe_of(folder)
    recipe = replace(recipe, root=wanted.root or recipe.root, weights=wanted.weights or recipe.weights)
    metrics = metrics_of(folder)
    tested = images_to_test(recipe, metrics)
    for note in tested.notes:
        print(note)
    view = view_of(recipe.model, recipe.weights, recipe.image_size)
    model = trained_model(folder, recipe, view, metrics["classes"])
    matrix = confusion_of(model, Transformed(tested.images, view.plain), recipe, metrics["classes"], wanted.batch_size)
    return _written(wanted.output or folder, folder, metrics["classes"], matrix, tested)


def trained_model(folder: Path, recipe: Recipe, view: View, classes: Sequence[str]) -> nn.Module:
    """Return the model of a run as it was at its best epoch, on a GPU if there is one."""
    weights = recipe.weights or default_weights(recipe.model)
    model = build_model(ModelSpec(recipe.model, len(classes), view.size, weights, recipe.seed))
    if adapter_config(recipe, recipe.seed) is not None:
        load_adapter(model, folder)
    else:
        load_trained(model, folder / TRAINED)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def computing_of(model: nn.Module, recipe: Recipe) -> AbstractContextManager[Any]:
    """Return an autocast context for the run's precision, on the model's device."""
    device = next(model.parameters()).device.type
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.precision)
    return torch.autocast(device, dtype, enabled=dtype is not None)


def confusion_of(model: nn.Module, images: Transformed, recipe: Recipe, classes: Sequence[str], batch_size: int = 64) -> Tensor:
    """Return the confusion matrix of some images, computed in the precision of the run."""
    computing = computing_of(model, recipe)
    return confusion(model, images, len(classes), batch_size=batch_size, workers=workers_of(recipe), computing=computing)


def _written(output: Path, folder: Path, classes: Sequence[str], matrix: Tensor, tested: ImagesToTest) -> dict[str, Any]:
    """Write the record and the picture to files, and print the table."""
    measured: dict[str, Any] = {
        "test_accuracy": accuracy_of(matrix),
        "balanced_accuracy": balanced_accuracy_of(matrix),
        "classes": _by_class(matrix, classes),
    }
    output.mkdir(parents=True, exist_ok=True)
    record = measured | {"confusion": matrix.tolist(), "protocol": tested.protocol}
    write_atomically(output / "evaluation.json", (json.dumps(record, indent=1) + "\n").encode())
    draw_confusion(output / "confusion.png", matrix, tuple(classes))
    print(_table(measured["classes"]))
    print(f"{folder}: {100 * measured['test_accuracy']:.2f} % of {int(matrix.sum())} test images")
    print(f"balanced accuracy, the mean over classes: {100 * measured['balanced_accuracy']:.2f} %")
    return measured


def _by_class(matrix: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each class its images, how many of them were classified as it (recall), and the precision of that answer."""
    images, taken, right = matrix.sum(1).tolist(), matrix.sum(0).tolist(), matrix.diagonal().tolist()
    return [
        {
            "class": name,
            "images": images[i],
            "recall": right[i] / images[i] if images[i] else None,
            "precision": right[i] / taken[i] if taken[i] else None,
            "most_often_taken_for": classes[int(matrix[i].argmax())] if images[i] else None,
        }
        for i, name in enumerate(classes)
    ]


def _table(classes: list[dict[str, Any]]) -> str:
    rows = [("class", "images", "recall", "precision", "most often taken for")]
    for row in classes:
        shares = ("-" if row[name] is None else f"{100 * row[name]:.1f} %" for name in ("recall", "precision"))
        rows.append((row["class"], str(row["images"]), *shares, row["most_often_taken_for"] or "-"))
    return aligned(rows, str.ljust) + "\n"
