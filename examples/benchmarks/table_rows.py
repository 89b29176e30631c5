"""The benchmarks' tables as rows of cells, from their results: the same for the screen and the README."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from contenders import FLOOR, LOCA, LOCATIONS
from loca_vision.messages import aligned
from rounds import ratio

Rows = list[list[str]]


def training_step(report: Mapping[str, Any]) -> Rows:
    seconds, peaks, operators = report["seconds"], report.get("peak MB"), report.get("operators")
    lora = f"LoRA r={report['settings']['rank']}, peft"
    header = ["method", "trained numbers", "seconds a step", "of the floor"]
    header += ["peak MB"] * bool(peaks) + ["of peft's LoRA"] * bool(peaks and lora in peaks)
    header += ["operators a projection"] * bool(operators)
    rows = [header]
    for name, own in seconds.items():
        row = [name, f"{report['trained'][name]:,}", f"{median(own):.3f}", f"{ratio(own, seconds[FLOOR]):.2f}"]
        if peaks:
            row += [f"{peaks[name]:,.0f}"] + [f"{peaks[name] / peaks[lora]:.2f}" for _ in range(lora in peaks)]
        if operators:
            row.append(f"{operators[name]['for each']:.1f}" if "for each" in operators[name] else "-")
        rows.append(row)
    return rows


SHOWN = (LOCA, LOCATIONS, "LoRA", "LoRA, peft", "FourierFT, peft")  # of all methods, in the table of all steps


def steps(reports: Sequence[Mapping[str, Any]]) -> Rows:
    """Return a row for each report of training steps: the floor's seconds, and the usual methods' ratios to it."""
    found = [["step", "threads", "floor, s", *SHOWN]]
    for report in reports:
        seconds = {re.sub(r" [rn]=\d+", "", name): own for name, own in report["seconds"].items()}
        ratios = [f"{ratio(seconds[name], seconds[FLOOR]):.2f}" if name in seconds else "-" for name in SHOWN]
        threads, floor = str(report["environment"]["threads"]), f"{median(seconds[FLOOR]):.2f}"
        found.append([f"`{_what_is_timed(report['command'])}`", threads, floor, *ratios])
    return found


def _what_is_timed(command: str) -> str:
    """Return the command without its folder and without the options for methods, outputs and repetitions."""
    script, *options = re.split(r" (?=--)", command.removeprefix("python "))
    beside = ("--only", "--output", "--memory", "--operators", "--rounds", "--threads")
    return " ".join([script.rpartition("/")[2], *(option for option in options if not option.startswith(beside))])


def calls(report: Mapping[str, Any]) -> Rows:
    """Return the rows of inference: calls, loading, switching, and the sizes in memory and files."""
    figures = report["figures"]
    timed = [name for name in ("call", "load", "first call", "switch", "call after switch") if _anywhere(figures, name)]
    sizes = [name for name in ("MB held", "bytes an adapter", "file bytes") if _anywhere(figures, name)]
    rows = [["method", *(f"{name}, s" for name in timed), "call of the base's", *sizes]]
    for name, own in figures.items():
        seconds = [f"{median(own[column]):.3f}" if column in own else "-" for column in timed]
        against = f"{ratio(own['call'], figures['base']['call']):.3f}"
        rows.append([name, *seconds, against, *(_size(own.get(column)) for column in sizes)])
    return rows


def _anywhere(figures: Mapping[str, Mapping[str, Any]], column: str) -> bool:
    return any(column in own for own in figures.values())


def _size(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def scaling(report: Mapping[str, Any]) -> Rows:
    """Return where each method is free, compared with the lower bound, and where it is as cheap as LoRA."""
    rows = [["sweep", "method", "of the lower bound, from first to last", "free", "as cheap as LoRA"]]
    for sweep, found in report["free"].items():
        for method, own in found.items():
            rows.append([sweep, method, f"{own['ratios'][0]:.2f} to {own['ratios'][-1]:.2f}", own["floor"], own["LoRA"]])
    return rows


KINDS = {
    "training_step": training_step,
    "pipeline_adapters": calls,
    "inference": calls,
    "mixed_batch": calls,
    "scaling": scaling,
}


def rows(report: Mapping[str, Any]) -> Rows:
    """Return the rows of a report's table.

    Raises:
        ValueError: the report's benchmark has no table.
    """
    kind = report.get("benchmark")
    if kind not in KINDS:
        raise ValueError(f"benchmark={kind!r}: those with a table are {', '.join(KINDS)}")
    return KINDS[kind](report)


def shown(report: Mapping[str, Any]) -> str:
    """Format the table for a screen, with names left-aligned and numbers right-aligned."""
    found = rows(report)
    width = max(len(row[0]) for row in found)
    return aligned([[row[0].ljust(width), *row[1:]] for row in found], str.rjust)
