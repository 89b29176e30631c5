"""The report: a table, a plot of likeness against trained numbers, and two sheets of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from loca_vision.methods.by_name import title_of
from loca_vision.recipes.reports.contact_sheet import contact_sheet
from loca_vision.recipes.reports.plots import save
from subject_study.arms import Arm, Task
from subject_study.measures import Studio
from subject_study.scenes import CLASS, STYLE, SUBJECT

SCALES = (0.0, 0.5, 1.0)
SUBJECT_PROMPTS = (
    SUBJECT,
    f"{SUBJECT} at night",
    f"{SUBJECT} at sea",
    f"{SUBJECT} on a green background",
    "two sks fish on a white background",
)
STYLE_PROMPTS = (f"a yellow boat {STYLE}", f"a pink cat {STYLE}", f"a green bird {STYLE}")
CLASS_PROMPTS = (
    CLASS,
    "a fish in a meadow",
    "a blue fish",
    "a red fish in the snow",
    "two yellow fish at sea",
    "a bird",
    "a cup",
)
_CELL = 120  # pixels per side: three for each pixel of a picture
_COLUMNS = {
    "subject": {
        "likeness": "likeness",
        "marks": "marks of the subject, %",
        "new_places": "new places, %",
        "class_marks": "marks in the class, %",
        "class_change": "change of the class, of 255",
    },
    "style": {
        "likeness": "likeness",
        "neon": "neon, %",
        "kinds": "right kinds, %",
        "plain_neon": "neon unasked, %",
        "plain_change": "change of other pictures, of 255",
    },
}
_SHARES = {"marks", "new_places", "class_marks", "neon", "kinds", "plain_neon"}


@dataclass(frozen=True)
class Result:
    """The results of one adapter, or of the base.

    Args:
        arm: the adapter; None for the base.
        measured: see `measures`.
        trained: the number of trained parameters.
        size: the size of the adapter's file in bytes.
        seconds: the duration of a training step.
    """

    arm: Arm | None
    measured: Mapping[str, float]
    trained: int = 0
    size: int = 0
    seconds: float | None = None


def table(task: str, results: Sequence[Result]) -> str:
    """Return a Markdown table with a row for each result."""
    columns = _COLUMNS[task]
    heads = ["", *columns.values(), "trained numbers", "bytes", "rate"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for one in results:
        cells = [_title(one.arm), *(_cell(name, one.measured[name]) for name in columns)]
        cells += [f"{one.trained:,}", f"{one.size:,}", f"{one.arm.rate:g}"] if one.arm else ["-"] * 3
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _title(arm: Arm | None) -> str:
    if arm is None:
        return "base"
    return arm.title + (", with prior preservation" if arm.prior else "")


def _cell(name: str, value: float) -> str:
    if name in _SHARES:
        return f"{100 * value:.0f}"
    return f"{value:.1f}" if name.endswith("change") else f"{value:.2f}"


def draw_numbers(path: Path, results: Mapping[Task, Sequence[Result]], ceilings: Mapping[Task, float]) -> None:
    """Plot likeness against trained numbers, with a panel for each task and a line for each method."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False).flat
    titles = {"subject": f'"{SUBJECT} …"', "style": f'"… {STYLE}", things never shown in it'}
    for panel, (task, found) in zip(panels, results.items(), strict=True):
        arms = [one for one in found if one.arm is not None and not one.arm.prior]
        for number, method in enumerate(dict.fromkeys(one.arm.method for one in arms if one.arm)):
            of = sorted((one for one in arms if one.arm and one.arm.method == method), key=lambda one: one.trained)
            likeness = [one.measured["likeness"] for one in of]
            panel.plot([one.trained for one in of], likeness, "o-", color=f"C{number}", label=title_of(method))
        (base,) = (one.measured["likeness"] for one in found if one.arm is None)
        panel.axhline(ceilings[task], color="#555555", linestyle=":", label="other drawings of the same")
        panel.axhline(base, color="#555555", linestyle="--", label="the base without an adapter")
        panel.set(xscale="log", xlabel="trained numbers", title=titles[task])
        sizes = sorted({one.trained for one in arms})
        panel.set_xticks(sizes, [f"{size:,}" for size in sizes])
        panel.set_xticks([], minor=True)
    figure.axes[0].set_ylabel("likeness to held-out drawings")
    figure.axes[-1].legend(fontsize=8)
    save(figure, path)


def scales_sheet(studio: Studio, subject: Path, style: Path) -> Image.Image:
    """Return a sheet with a column for each prompt and a row for each scale; every column has one seed."""
    rows: list[list[Image.Image]] = [[] for _ in SCALES]
    for folder, prompts in ((subject, SUBJECT_PROMPTS), (style, STYLE_PROMPTS)):
        numbers = range(len(rows[0]), len(rows[0]) + len(prompts))
        with studio.adapted(folder):
            for row, scale in zip(rows, SCALES, strict=True):
                row += studio.draw_one(prompts, numbers, scale)
    labels = [f"scale {scale:g}" + (", the base" if scale == 0 else "") for scale in SCALES]
    return contact_sheet(rows, columns=[*SUBJECT_PROMPTS, *STYLE_PROMPTS], labels=labels, side=_CELL)


def class_sheet(studio: Studio, adapters: Mapping[str, Path | None]) -> Image.Image:
    """Return a sheet with a column for each prompt that does not name the subject, and a row for the base and each adapter."""
    rows = []
    for folder in adapters.values():
        with studio.adapted(folder):
            rows.append(studio.draw_one(CLASS_PROMPTS, range(100, 100 + len(CLASS_PROMPTS))))
    return contact_sheet(rows, columns=CLASS_PROMPTS, labels=list(adapters), side=_CELL)


def as_json(one: Result) -> dict[str, Any]:
    """Return the result in the form stored in results.json."""
    arm = None if one.arm is None else {"name": one.arm.name, **vars(one.arm)}
    return {"arm": arm, "measured": dict(one.measured), "trained": one.trained, "bytes": one.size, "seconds": one.seconds}
