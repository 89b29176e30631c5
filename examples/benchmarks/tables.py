"""The tables of the benchmarks in Markdown, from the JSON files that the scripts wrote.

The marks in a page select its tables: every table, each with its command and machine, or all training steps in one table.

    python examples/benchmarks/tables.py
    python examples/benchmarks/tables.py --write docs/guides/memory_and_speed.md examples/benchmarks/results/README.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loca_vision.storage.atomic_file import write_atomically
from rounds import run
from table_rows import KINDS, Rows, rows, steps

SCRIPT = "tables.py"
EVERY, STEPS = (f"<!-- {what}: written by examples/benchmarks/tables.py -->" for what in ("tables", "training steps"))
END = "<!-- written so far -->"
LIBRARIES = ("torch", "timm", "diffusers", "peft")
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """Print the tables of the benchmarks, or put them into pages between their marks."""

    results: Path = Path(__file__).parent / "results"
    """Folder of the JSON files; the tables are sorted by file name."""
    write: tuple[Path, ...] = ()
    """Markdown files with marks; the text between the marks is replaced."""


def every_table(reports: Sequence[Report]) -> str:
    return "\n\n".join(map(markdown, reports))


def all_steps(reports: Sequence[Report]) -> str:
    """Return a table with a row for each measured training step, or an empty string if there is none."""
    found = [report for report in reports if report["benchmark"] == "training_step"]
    return grid(steps(found)) if found else ""


WRITERS: dict[str, Callable[[Sequence[Report]], str]] = {EVERY: every_table, STEPS: all_steps}


def markdown(report: Report) -> str:
    """Return one table, below a line with its command and machine."""
    return f"{about(report)}\n\n{grid(rows(report))}"


def grid(found: Rows) -> str:
    header, *others = found
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *others])


def about(report: Report) -> str:
    machine, settings = report["environment"], report["settings"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    versions = [f"{name} {machine[name]}" for name in LIBRARIES if machine.get(name)]
    counted = f"medians of {settings['rounds']} rounds" if settings["rounds"] > 1 else "1 round"
    return f"`{report['command']}` ({', '.join([machine['gpu'] or machine['processor'], threads, *versions])}; {counted}):"


def reports_in(folder: Path) -> list[Report]:
    """Return the reports in a folder that have a table.

    Raises:
        ValueError: a file is not a report of a benchmark.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            report = json.loads(file.read_text())
            if report["benchmark"] in KINDS:  # others are kept as they are
                markdown(report)
                found.append(report)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: no report of a benchmark ({type(error).__name__}: {error})") from error
    return found


def filled(text: str, reports: Sequence[Report]) -> str:
    """Return the text with the contents between marks replaced by tables.

    Raises:
        ValueError: there is no mark, a mark appears twice, or a mark has no end.
    """
    marks = [mark for mark in WRITERS if mark in text]
    if not marks:
        raise ValueError(f"expected one of the marks {EVERY} and {STEPS}, got none")
    for mark in marks:
        before, _, rest = text.partition(mark)
        _, end, after = rest.partition(END)
        if mark in rest or not end or any(other in rest[: len(rest) - len(after)] for other in WRITERS):
            raise ValueError(f"expected the mark {mark} once, and then {END}")
        table = WRITERS[mark](reports)
        text = f"{before}{mark}\n\n{table}\n\n{END}{after}" if table else f"{before}{mark}\n{END}{after}"
    return text


def work(settings: Settings) -> None:
    reports, pages = reports_in(settings.results), {}
    if not settings.write:
        print(every_table(reports))
    for page in settings.write:
        try:
            pages[page] = filled(page.read_text(), reports)
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from error
    for page, text in pages.items():
        write_atomically(page, text.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
