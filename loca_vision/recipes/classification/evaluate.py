"""Test a trained classifier again, from what its run left behind: accuracy, a table of classes, a confusion matrix."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.formats.save_load import load_adapter
from loca_vision.messages import aligned
from loca_vision.methods.registry import unknown_method
from loca_vision.recipes.classification.accuracy import accuracy_of, confusion
from loca_vision.recipes.classification.models import build_model
from loca_vision.recipes.classification.presets import PRESETS
from loca_vision.recipes.classification.recipe import METHODS, Recipe, adapter_config
from loca_vision.recipes.classification.task import Task, task_of
from loca_vision.recipes.classification.trained_weights import TRAINED, load_trained
from loca_vision.recipes.reports.plots import draw_confusion
from loca_vision.recipes.settings.command_line import parse
from loca_vision.recipes.settings.plugins import Imports, import_modules
from loca_vision.storage.atomic_file import write_atomically


@dataclass(frozen=True)
class Evaluate:
    """Test a classifier that train.py trained: the accuracy that the run printed, every class, what was taken for what."""

    adapter: str
    """The run's folder, or a repository of the hub that has one in it."""
    root: Path | None = None
    """Where the images lie now, if elsewhere than in training."""
    weights: str | None = None
    """Where the base weights are now, if elsewhere."""
    batch_size: int = 64
    """Images at a time."""
    imports: Imports = ()
    """A module, by its name or as a .py file, that defines the adapter's method; may be repeated."""
    output: Path | None = None
    """Where evaluation.json and confusion.png go; by default the run's folder."""


def evaluate(wanted: Evaluate) -> dict[str, Any]:
    """Test, write both files, print the table.

    Raises:
        FileNotFoundError, ValueError, OSError: something of the run is missing or not as it was written.
    """
    import_modules(wanted.imports)
    folder = _folder(wanted.adapter)
    recipe = _recipe(folder, wanted)
    task = task_of(recipe, recipe.seed)
    model = trained_model(folder, task, recipe)
    matrix = tested(model, task, recipe, wanted.batch_size)
    found: dict[str, Any] = {"test_accuracy": accuracy_of(matrix), "classes": _by_class(matrix, task.splits.classes)}
    output = wanted.output or folder
    output.mkdir(parents=True, exist_ok=True)
    record = found | {"confusion": matrix.tolist(), "protocol": task.splits.protocol}
    write_atomically(output / "evaluation.json", (json.dumps(record, indent=1) + "\n").encode())
    draw_confusion(output / "confusion.png", matrix, task.splits.classes)
    print(_table(found["classes"]))
    print(f"{folder}: {100 * found['test_accuracy']:.2f} % of {int(matrix.sum())} test images")
    return found


def trained_model(folder: Path, task: Task, recipe: Recipe) -> nn.Module:
    """The model of a run as it was at its best epoch, on a GPU where there is one."""
    model = build_model(task.spec)
    if adapter_config(recipe, recipe.seed) is not None:
        load_adapter(model, folder)
    else:
        load_trained(model, folder / TRAINED)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def tested(model: nn.Module, task: Task, recipe: Recipe, batch_size: int = 64) -> Tensor:
    """The confusion matrix of the test images, computed in the precision of the run."""
    device = next(model.parameters()).device.type
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.precision)
    computing = torch.autocast(device, dtype, enabled=dtype is not None)
    return confusion(model, task.test, task.spec.classes, batch_size=batch_size, workers=task.workers, computing=computing)


def _folder(adapter: str) -> Path:
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or adapter.count("/") != 1:
        raise FileNotFoundError(f"{adapter}: it is neither the folder of a run nor a repository of the hub, user/name")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(adapter, allow_patterns=["*.safetensors", "config.yaml", "metrics.json"]))


def _recipe(folder: Path, wanted: Evaluate) -> Recipe:
    """The settings of the run, read as strictly as a user's; no code is imported because they say so."""
    file = folder / "config.yaml"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: there is no such file; train.py writes it beside the adapter")
    recipe = parse(Recipe, ["--config", str(file)], prog="evaluate.py", presets=PRESETS, importing=False).settings
    if recipe.method not in METHODS.known():
        raise ValueError(f"{file}: {unknown_method(recipe.method, METHODS.known())}")
    return replace(recipe, root=wanted.root or recipe.root, weights=wanted.weights or recipe.weights)


def _by_class(matrix: Tensor, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    """Of every class: its images, how many were taken for it (recall), and how many taken for it are of it (precision)."""
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
    for one in classes:
        shares = ("-" if one[name] is None else f"{100 * one[name]:.1f} %" for name in ("recall", "precision"))
        rows.append((one["class"], str(one["images"]), *shares, one["most_often_taken_for"] or "-"))
    return aligned(rows, str.ljust) + "\n"
