"""The files a training run leaves behind: metrics.json and curves.png."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loca_vision.storage.atomic_file import write_atomically

METRICS = "metrics.json"
_MEANS = ("balanced_accuracy", "validation_accuracy", "seconds_per_step")


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Write `metrics.json` into the folder, either completely or not at all."""
    write_atomically(folder / METRICS, (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read the metrics of a finished run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not what a run writes.
    """
    path = folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; a run that has finished writes it")
    try:
        metrics = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: it is not JSON ({error})") from error
    if not isinstance(metrics, dict) or not isinstance(metrics.get("config"), dict):
        raise ValueError(f"{path}: it is not what a training run writes: it has no config")
    return metrics


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean and standard deviation (of a sample, n - 1) over the runs of several seeds."""
    accuracies = [run["test_accuracy"] for run in runs]
    return {
        "seeds": [run["seed"] for run in runs],
        "test_accuracies": accuracies,
        "test_accuracy": statistics.fmean(accuracies),
        "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        **{name: statistics.fmean(run[name] for run in runs if name in run) for name in _MEANS if name in runs[0]},
        **{name: runs[0][name] for name in ("trained_parameters", "location_parameters", "head_parameters", "adapter_bytes")},
    }
