"""The report on adapters that edit photographs: a table, pictures, and quality against trained numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from loca_vision.data.images import open_image
from loca_vision.methods.by_name import title_of
from loca_vision.recipes.reports.contact_sheet import contact_sheet
from loca_vision.recipes.reports.plots import COLOURS, save

_COLOURS = ("#222222", *COLOURS, "#8c62b5", "#b8860b")  # one for each of the compared editors
MEASURES = {"psnr_to_target": "PSNR, dB", "ssim_to_target": "SSIM"}


@dataclass(frozen=True)
class Arm:
    """One editor and how close its edits are to their targets.

    Args:
        name: "photograph" for no edit at all, "base", or a method.
        measured: the mean of each of `MEASURES` over the held-out pairs.
        trained: the number of trained parameters; 0 without an adapter.
        size: the size of the adapter's file in bytes.
        rate: the learning rate.
        seconds: the duration of a training step.
        gain: the median over the pairs of the PSNR gain over the base's edit, in dB.
        nearer: the share of the pairs for which this gain is positive.
    """

    name: str
    measured: Mapping[str, float]
    trained: int = 0
    size: int = 0
    rate: float | None = None
    seconds: float | None = None
    gain: float | None = None
    nearer: float | None = None

    @property
    def title(self) -> str:
        """The name for tables and plots."""
        return {"photograph": "the photograph as it is", "base": "base"}.get(self.name, title_of(self.name))


def arms_of(evaluation: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]) -> list[Arm]:
    """Return an arm for the unedited photograph, the base, and every method.

    Args:
        evaluation: the evaluation that evaluate.py wrote; its first adapter has scale 1.
        metrics: the metrics that train.py wrote, by method, in the order of the evaluation.
    """
    found = [Arm(name, _means(evaluation, name)) for name in ("photograph", "base")]
    for name, of in metrics.items():
        title = column(evaluation, name)
        gains = _gains(evaluation, title)
        found.append(
            Arm(
                name,
                _means(evaluation, title),
                of["trained_parameters"],
                of["adapter_bytes"],
                float(of["config"]["learning_rate"]),
                of["seconds_per_step"],
                median(gains),
                sum(gain > 0 for gain in gains) / len(gains),
            )
        )
    return found


def _gains(evaluation: Mapping[str, Any], title: str) -> list[float]:
    """Return, for each pair, the PSNR to the target minus that of the base's edit."""
    found = []
    for entry in evaluation["photographs"]:
        mine, base = (entry["measures"][editor]["psnr_to_target"] for editor in (title, "base"))
        found.append((math.inf if mine is None else mine) - (math.inf if base is None else base) if mine != base else 0.0)
    return found


def column(evaluation: Mapping[str, Any], name: str) -> str:
    """Return the name under which evaluate.py lists an adapter at scale 1."""
    return name if name in evaluation["means"] else f"{name} at 1"


def _means(evaluation: Mapping[str, Any], name: str) -> dict[str, float]:
    return {measure: float(evaluation["means"][name][measure]["mean"]) for measure in MEASURES}


def study_table(arms: Sequence[Arm]) -> str:
    """Return a Markdown table with a row for each arm."""
    heads = [
        "",
        *MEASURES.values(),
        "nearer than base",
        "median gain, dB",
        "trained numbers",
        "bytes",
        "rate",
        "seconds a step",
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for arm in arms:
        cells = [arm.title, f"{arm.measured['psnr_to_target']:.2f}", f"{arm.measured['ssim_to_target']:.3f}"]
        cells += ["-" if arm.nearer is None else f"{100 * arm.nearer:.0f} %", "-" if arm.gain is None else f"{arm.gain:+.2f}"]
        cells += [f"{arm.trained:,}", f"{arm.size:,}"] if arm.trained else ["-", "-"]
        cells += ["-" if arm.rate is None else f"{arm.rate:g}", "-" if arm.seconds is None else f"{arm.seconds:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def study_sheet(
    folder: Path,
    evaluation: Mapping[str, Any],
    methods: Sequence[str],
    pairs: Sequence[tuple[Image.Image, Image.Image]],
    every: int,
) -> Image.Image:
    """Return a sheet with a row for each photograph: the photograph itself, its edits, and the target.

    Args:
        folder: the folder of the evaluation, which contains the edits.
        pairs: the photograph and the target of each entry of the evaluation.
        every: show the first pair of every group of this many, such as the pairs of one photograph.
    """
    names = ["base", *(column(evaluation, name) for name in methods)]
    shown = list(zip(evaluation["photographs"], pairs, strict=True))[::every]
    rows = [
        [photo, *(open_image(folder / entry["edits"][name]) for name in names), cartoon] for entry, (photo, cartoon) in shown
    ]
    columns = ["photograph", "base", *(title_of(name) for name in methods), "target"]
    return contact_sheet(rows, columns=columns, labels=[entry["label"] for entry, _ in shown])


def draw_numbers(path: Path, title: str, arms: Sequence[Arm]) -> None:
    """Plot PSNR and SSIM to the target against trained numbers, with lines for the arms that have no adapter."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    panels = figure.subplots(1, len(MEASURES))
    for panel, (measure, label) in zip(panels, MEASURES.items(), strict=True):
        for arm, colour in zip(arms, _COLOURS, strict=False):
            value = arm.measured[measure]
            if arm.trained:
                panel.plot([arm.trained], [value], "o", color=colour, label=arm.title)
            else:
                panel.axhline(value, color=colour, linestyle="--" if arm.name == "base" else ":", label=arm.title)
        panel.set(xlabel="trained numbers", ylabel=f"{label} to the target")
        panel.set_xlim(0, 1.25 * max(arm.trained for arm in arms))
    panels[-1].legend(fontsize=8)
    figure.suptitle(title)
    save(figure, path)
