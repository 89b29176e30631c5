"""Runs of train-classifier in the layout of the paper's Table 4, next to its numbers. What was not run stays blank."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from loca_vision.recipes.classification.recipe import EARLIER, MAY_DIFFER_ON_RESUME
from loca_vision.recipes.reports.metrics import METRICS, read_metrics
from loca_vision.recipes.settings.console import run_command
from loca_vision.storage.atomic_file import write_atomically

COLUMNS = ("oxford_pets", "stanford_cars", "cifar10", "dtd", "eurosat", "fgvc_aircraft", "resisc45", "cifar100")
TITLES = ("Pets", "Cars", "CIFAR10", "DTD", "EuroSAT", "FGVC", "RESISC45", "CIFAR100")
# Table 4 of LoCA (ICLR 2025): accuracy in percent, means of 5 runs; ViT-B/16 and ViT-L/16 pretrained on ImageNet-21k.
PAPER = (
    ("ViT-B", "linear probe", "-", (92.94, 47.02, 96.82, 76.47, 94.78, 29.21, 86.13, 86.05)),
    ("ViT-B", "full", "85.8M", (93.09, 84.71, 98.89, 77.37, 98.91, 63.83, 95.72, 90.72)),
    ("ViT-B", "LoRA", "581K", (93.26, 82.12, 98.51, 79.54, 98.65, 55.67, 94.82, 91.51)),
    ("ViT-B", "FourierFT", "72K", (93.07, 73.74, 98.64, 77.72, 98.32, 48.24, 92.89, 91.23)),
    ("ViT-B", "LoCA", "72K", (93.36, 77.78, 98.66, 78.44, 98.94, 53.23, 93.88, 91.40)),
    ("ViT-B", "FourierFT", "239K", (93.44, 79.34, 98.70, 79.43, 98.81, 52.26, 94.19, 91.60)),
    ("ViT-B", "LoCA", "239K", (94.10, 80.11, 98.62, 80.15, 99.04, 54.86, 94.73, 91.68)),
    ("ViT-L", "LoRA", "1.57M", (94.34, 85.92, 98.93, 79.90, 98.91, 64.47, 95.63, 92.37)),
    ("ViT-L", "FourierFT", "144K", (94.52, 75.35, 99.12, 79.78, 98.79, 48.32, 94.18, 93.01)),
    ("ViT-L", "LoCA", "144K", (94.60, 82.04, 98.92, 79.02, 98.97, 57.62, 94.42, 91.76)),
    ("ViT-L", "FourierFT", "480K", (94.78, 82.27, 99.00, 79.03, 98.95, 56.96, 95.53, 92.56)),
    ("ViT-L", "LoCA", "480K", (94.47, 83.47, 99.02, 80.21, 99.03, 63.02, 95.49, 92.65)),
)


@dataclass(frozen=True)
class Report:
    """Make a table of all runs below some folders: a row for each model, method and number of trained parameters."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders that are searched for metrics.json, including subfolders."""
    format: Literal["markdown", "csv", "latex"] = "markdown"
    """Format of the table."""
    measure: Literal["test_accuracy", "balanced_accuracy"] = "test_accuracy"
    """Accuracy over the test images, as in the paper, or its mean over the classes."""
    paper: bool = True
    """Put the paper's rows above, marked as such. Compare with them only runs of the same models on the same data."""
    output: Path | None = None
    """A file for the table, instead of the screen."""


@dataclass(frozen=True)
class Row:
    """One row: accuracies in percent by data set, each a list over seeds."""

    source: str
    model: str
    method: str
    trained: str
    found: dict[str, list[float]]


def main(arguments: Sequence[str] | None = None, *, prog: str = "report.py") -> int:
    """Report as the command line says; return the exit status."""
    return run_command(prog, Report, print_report, arguments, extra="train")


def print_report(wanted: Report) -> None:
    """Print the table, or write it to the requested file."""
    text = report(wanted)
    if wanted.output is None:
        print(text, end="")
    else:
        write_atomically(wanted.output, text.encode())


def report(wanted: Report) -> str:
    """Return the table as text."""
    rows = gathered(wanted.folders, wanted.measure)
    others = {name for row in rows for name in row.found} - set(COLUMNS)
    columns = (*COLUMNS, *sorted(others))
    titles = [*TITLES, *sorted(others)]
    if wanted.paper and wanted.measure == "test_accuracy":
        paper = [
            Row("paper", model, method, trained, {name: [value] for name, value in zip(COLUMNS, found, strict=True)})
            for model, method, trained, found in PAPER
        ]
        rows = [*paper, *rows]
    head = ["", "model", "method", "trained", *titles, "mean of eight"]
    body = [[row.source, row.model, row.method, row.trained, *_cells(row, columns)] for row in rows]
    return {"markdown": _markdown, "csv": _csv, "latex": _latex}[wanted.format]([head, *body])


def gathered(folders: Sequence[Path], measure: str = "test_accuracy") -> list[Row]:
    """Return a row for each model, method and number of trained parameters, with one setting per cell and any number of seeds.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: two runs of a cell differ in more than the seed, or have the same seed; or a run lacks the measure.
    """
    rows: dict[tuple[str, str, int], Row] = {}
    settings: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}
    seeds: dict[tuple[Any, ...], Path] = {}
    for path, metrics in _runs(folders):
        config = metrics["config"]
        key = (config["model"], config["method"], metrics["trained_parameters"])
        row = rows.setdefault(key, Row("runs", key[0], key[1], f"{key[2]:,}", {}))
        mine = EARLIER | {name: value for name, value in config.items() if name not in MAY_DIFFER_ON_RESUME | {"seed", "root"}}
        first, theirs = settings.setdefault((*key, config["dataset"]), (path, mine))
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise ValueError(
                    f"{path} and {first} are runs of one cell that differ: {name}={mine.get(name)!r} and {theirs.get(name)!r}"
                )
        other = seeds.setdefault((*key, config["dataset"], metrics["seed"]), path)
        if other != path:
            raise ValueError(f"{path} and {other} are runs of one cell with the same seed, {metrics['seed']}")
        if measure not in metrics:
            raise ValueError(f"{path}: expected {measure}, got a run of an earlier version without it")
        row.found.setdefault(config["dataset"], []).append(100 * metrics[measure])
    if not rows:
        raise FileNotFoundError(f"{', '.join(map(str, folders))}: there is no {METRICS} of a finished run")
    return [rows[key] for key in sorted(rows)]


def _runs(folders: Sequence[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield single runs; the summary of several seeds is skipped in favour of its parts."""
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: there is no such folder")
    for file in sorted({file.resolve() for folder in folders for file in folder.rglob(METRICS)}):
        metrics = read_metrics(file.parent)
        if "seed" in metrics:
            yield file, metrics


def _cells(row: Row, columns: Sequence[str]) -> list[str]:
    means = {name: statistics.fmean(values) for name, values in row.found.items()}
    cells = [_cell(row.found.get(name, [])) for name in columns]
    whole = all(name in means for name in COLUMNS)
    return [*cells, f"{statistics.fmean(means[name] for name in COLUMNS):.2f}" if whole else ""]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _markdown(table: list[list[str]]) -> str:
    head, *body = ["| " + " | ".join(cells) + " |" for cells in table]
    return "\n".join([head, "|" + "---|" * len(table[0]), *body]) + "\n"


def _csv(table: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(table)
    return text.getvalue()


def _latex(table: list[list[str]]) -> str:
    """Return a tabular for booktabs."""
    rows = [" & ".join(_escaped(cell) for cell in cells) + r" \\" for cells in table]
    begin = r"\begin{tabular}{llll" + "r" * (len(table[0]) - 4) + "}"
    return "\n".join([begin, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    for sign in "&%_#":
        text = text.replace(sign, "\\" + sign)
    return text.replace("±", r"$\pm$")
