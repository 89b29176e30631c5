"""The head that a run begins with, where an earlier run has learned one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from loca_vision.recipes.classification.trained_weights import TRAINED, load_probe
from loca_vision.recipes.reports.metrics import read_metrics


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
        metrics = read_metrics(folder)
        if metrics["config"].get("method") != "lp":
            raise ValueError(f"it was trained by method {metrics['config'].get('method')}: expected a run of --method lp")
        if metrics.get("classes") != list(classes):
            raise ValueError(f"its classes are {metrics.get('classes')}: expected {list(classes)}, in this order")
        load_probe(model, folder / TRAINED)
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"head={str(folder)!r}: {error}") from None
