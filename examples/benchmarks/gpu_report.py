"""Report a GPU run: tables for the screen and as a Markdown page, and pictures."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from contenders import FLOOR
from gpu_session import failures
from gpu_workloads import title
from loca_vision.messages import aligned
from loca_vision.storage.atomic_file import write_atomically
from rounds import ratio
from table_rows import Rows
from tables import LIBRARIES, grid

Run = Mapping[str, Any]
DRY = "Dry run on the {device}: figures mean nothing."


def heading(found: Run) -> str:
    """Describe in one line where and with which versions the benchmark ran."""
    device = found["device"]
    where = f"{device['card']}, {device['memory GB']} GB" if "card" in device else found["environment"]["processor"]
    said = device.get("nvidia-smi")
    driver = [f"driver {said['driver_version']}"] if isinstance(said, Mapping) and "driver_version" in said else []
    versions = [f"{name} {found['environment'][name]}" for name in LIBRARIES if found["environment"].get(name)]
    line = ", ".join([where, *driver, *versions, found["date"]])
    return f"{DRY.format(device=device['device'].upper())}\n{line}" if found["dry_run"] else line


def tables(found: Run) -> Iterator[tuple[str, Rows]]:
    """Yield titles and rows of everything that was measured."""
    parts = found["parts"]
    for part, suffix in (("steps", ""), ("compiled", ", compiled")):
        for name, own in _measured(parts.get(part, {}), "methods"):
            yield f"Training step, {title(name)}{suffix}", step_rows(own)
    for name, own in _measured(parts.get("inference", {}), "figures"):
        yield f"Inference, {title(name)}", inference_rows(own)
    for name, own in _measured(parts.get("mixed", {}), "figures"):
        yield f"An adapter for each sample, {title(name)}", inference_rows(own)
    study = parts.get("study", {}).get("runs")
    if study:
        yield "Classification at 224 pixels", [list(study[0]), *([str(value) for value in row.values()] for row in study)]


def _measured(part: Run, key: str) -> Iterator[tuple[str, Run]]:
    yield from ((name, own) for name, own in part.items() if isinstance(own, Mapping) and key in own)


def step_rows(own: Run) -> Rows:
    """Return milliseconds with quartiles, ratios (medians over rounds), memory and launches of the methods that took part."""
    header = ["method", "ms a step", "quartiles", "of the floor", "of peft's LoRA", "without update, ms", "peak MB", "launches"]
    methods = {name: row for name, row in own["methods"].items() if row.get("seconds")}
    lora = f"LoRA r={own['settings']['rank']}, peft"
    rows = [[*header, "copies", "GPU busy, ms", "trained", "first step, s"]]
    for name, row in methods.items():
        seconds = row["seconds"]
        low, high = _quartiles(seconds)
        rows.append([name, _ms(median(seconds)), f"{_ms(low)} to {_ms(high)}"])
        rows[-1] += [_ratio(seconds, methods.get(other)) for other in (FLOOR, lora)]
        rows[-1] += [_ms(median(row["forward and backward"])), _whole(row.get("peak MB"))]
        launched = row.get("launches", {})
        rows[-1] += [_whole(launched.get("kernels", launched.get("operators"))), _whole(launched.get("copies"))]
        rows[-1] += [_number(launched.get("busy ms")), _whole(row["trained"]), _number(row["first step"])]
    return rows


VERBS = ("load", "first call", "switch", "call after switch", "hot swap", "call after hot swap", "merge")


def inference_rows(own: Run) -> Rows:
    """Return, for each called method, milliseconds of a call, its ratio to the base's, milliseconds of verbs, and sizes."""
    figures = {name: row for name, row in own["figures"].items() if row.get("call")}
    timed = [verb for verb in VERBS if any(verb in row for row in figures.values())]
    rows = [["method", "call, ms", "of the base's", *(f"{verb}, ms" for verb in timed), "MB held", "file bytes"]]
    for name, row in figures.items():
        calls = row["call"]
        rows.append([name, _ms(median(calls)), _ratio(calls, {"seconds": figures.get("base", {}).get("call", [])})])
        rows[-1] += [_ms(median(row[verb])) if verb in row else "-" for verb in timed]
        rows[-1] += [_number(row.get("MB held")), _whole(row.get("file bytes"))]
    return rows


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def _ratio(seconds: Sequence[float], other: Run | None) -> str:
    return f"{ratio(seconds, other['seconds']):.3f}" if other and len(other["seconds"]) == len(seconds) else "-"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.2f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def not_done(found: Run) -> list[str]:
    return [f"{name}: {why}" for name, why in failures(found["parts"])]


def screen(found: Run) -> str:
    """Format the whole report for a terminal."""
    blocks = [heading(found)]
    for name, rows in tables(found):
        if len(rows) > 1:
            width = max(len(row[0]) for row in rows)
            blocks.append(f"{name}\n" + aligned([[row[0].ljust(width), *row[1:]] for row in rows], str.rjust))
    blocks += ["\n".join(_notes(found))] + ["Not done:\n" + "\n".join(not_done(found))] * bool(not_done(found))
    return "\n\n".join(block for block in blocks if block)


def _notes(found: Run) -> Iterator[str]:
    """Yield the notes that are not tables: the tests, and the line of costs."""
    tests = found["parts"].get("tests", {})
    if "outcomes" in tests:
        counts = ", ".join(f"{count} {outcome.lower()}" for outcome, count in tests["outcomes"].items())
        yield f"Tests on the device: status {tests['status']}; {counts or 'none ran'}"
        yield from (f"failed: {name}" for name in tests["failed"])
    line = found["parts"].get("costs", {}).get("line")
    if line:
        yield f"Costs that fit here: {line}"


def page(found: Run) -> str:
    """Format the whole report as Markdown."""
    blocks = ["# On a GPU", heading(found).replace("\n", "\n\n"), f"```bash\n{found['command']}\n```"]
    blocks += [f"![{name}]({shlex.quote(name)}.png)" for name, why in found.get("pages", {}).items() if not why]
    blocks += [f"## {name}\n\n{grid(rows)}" for name, rows in tables(found) if len(rows) > 1]
    notes = list(_notes(found))
    blocks += ["## Beside the tables\n\n" + "\n".join(f"* {line}" for line in notes)] * bool(notes)
    left = not_done(found)
    blocks += ["## Not done\n\n" + "\n".join(f"* {line}" for line in left)] * bool(left)
    return "\n\n".join(blocks) + "\n"


def written(folder: Path, found: dict[str, Any]) -> dict[str, str | None]:
    """Write pictures and page into a folder; return, for each picture, None or why it is missing."""
    pictures: dict[str, str | None] = {}
    try:
        import gpu_pictures

        pictures = gpu_pictures.drawn(folder, found)
    except Exception as error:  # a run continues without its pictures
        pictures = {"pictures": f"{type(error).__name__}: {error}"}
    write_atomically(folder / "README.md", page(found | {"pages": pictures}).encode())
    return pictures
