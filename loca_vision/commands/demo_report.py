"""The report of the demonstration: its table and metrics.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loca_vision.messages import aligned
from loca_vision.recipes.reports.environment import environment
from loca_vision.recipes.reports.plots import Travel
from loca_vision.recipes.training.fine_tune import Step
from loca_vision.storage.atomic_file import write_atomically


@dataclass(frozen=True)
class Result:
    """The result of one method. Trained numbers are counted as in the paper: coefficients, without the head."""

    method: str
    trained_parameters: int
    head_parameters: int
    test_accuracy: float
    seconds_per_step: float
    curve: list[Step]


def table(results: list[Result], travels: list[Travel], adapter_bytes: int, difference: float) -> str:
    """Return the comparison as text for a terminal, and what was checked."""
    rows = [("method", "trained numbers", "test accuracy", "seconds a step", "adapter bytes")]
    for result in results:
        size = f"{adapter_bytes:,}" if result.trained_parameters else "-"
        accuracy_text, seconds = f"{100 * result.test_accuracy:.1f} %", f"{result.seconds_per_step:.3f}"
        rows.append((result.method, f"{result.trained_parameters:,}", accuracy_text, seconds, size))
    moved = torch.cat([travel.moved for travel in travels]).float().mean().item()
    notes = (
        f"Trained numbers do not count the head ({results[0].head_parameters:,}), which is in the adapter's bytes.",
        f"{100 * moved:.0f} % of the components changed their cell.",
        f"Loaded into a new model in a new process, the adapter's logits differ by {difference:.1g}.",
    )
    return "\n".join(["", aligned(rows, str.rjust), "", *notes])


def write_metrics(
    path: Path,
    config: Any,
    results: list[Result],
    travels: list[Travel],
    adapter_bytes: int,
    difference: float,
    about: Mapping[str, Any],
) -> None:
    """Write everything needed to repeat or plot the run, and to rebuild its model (`about`), as one JSON object."""
    metrics = {
        **about,
        "config": {key: str(value) if isinstance(value, Path) else value for key, value in asdict(config).items()},
        "environment": environment(),
        "adapter_bytes": adapter_bytes,
        "largest_difference_after_reload": difference,
        "moved_components": {travel.name: int(travel.moved.sum()) for travel in travels},
        "methods": [asdict(result) for result in results],
    }
    write_atomically(path, json.dumps(metrics, indent=1).encode())
