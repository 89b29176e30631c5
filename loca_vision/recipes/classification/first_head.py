"""The head that a run begins with, where an earlier run has learned one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from loca_vision.model.heads import classifier
from loca_vision.recipes.classification.trained_weights import TRAINED, load_trained
from loca_vision.recipes.reports.metrics import read_metrics
from loca_vision.storage.safetensors_file import open_safetensors


def load_head(model: nn.Module, folder: Path, classes: Sequence[str]) -> None:
    """Put the head of a finished linear probe into a model without adapters.

    Args:
        model: the model, built like the probe's.
        folder: the folder of a run of `--method lp`.
        classes: the names of this run's classes, in their order.

    Raises:
        FileNotFoundError, ValueError: there is no finished linear probe, or it is for another model or other classes; the model
            is unchanged.
    """
    try:
        metrics, file = read_metrics(folder), folder / TRAINED
        if metrics["config"].get("method") != "lp":
            raise ValueError(f"it was trained by method {metrics['config'].get('method')}: expected a run of --method lp")
        if metrics.get("classes") != list(classes):
            raise ValueError(f"its classes are {metrics.get('classes')}: expected {list(classes)}, in this order")
        own = {id(parameter) for parameter in classifier(model)}
        expected = {name for name, parameter in model.named_parameters() if id(parameter) in own}
        with open_safetensors(file) as opened:
            if set(opened.entries) != expected:
                raise ValueError(f"{TRAINED} holds {sorted(opened.entries)}: expected the head, {sorted(expected)}")
        load_trained(model, file)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"head={str(folder)!r}: {error}") from None
