"""The tables of the benchmarks in Markdown, from the JSON files that the scripts wrote, each with its command and its machine.

python examples/benchmarks/tables.py
python examples/benchmarks/tables.py --write README.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loca_vision.atomic import write_atomically
from rounds import run
from table_rows import KINDS, rows

SCRIPT = "tables.py"
BEGIN, END = "<!-- benchmark tables: written by examples/benchmarks/tables.py -->", "<!-- end of benchmark tables -->"
LIBRARIES = ("torch", "timm", "diffusers", "peft")


@dataclass(frozen=True)
class Settings:
    """Print the tables of the benchmarks, or put them into a file between two marks."""

    results: Path = Path(__file__).parent / "results"
    """Folder of the JSON files; the tables come in the order of the names."""
    write: Path | None = None
    """A Markdown file that has the two marks; what is between them is replaced."""


def markdown(report: Mapping[str, Any]) -> str:
    """One table under a line that says how and on what it was made."""
    header, *others = rows(report)
    lines = [header, ["---"] * len(header), *others]
    return f"{about(report)}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def about(report: Mapping[str, Any]) -> str:
    machine, settings = report["environment"], report["settings"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    versions = [f"{name} {machine[name]}" for name in LIBRARIES if machine.get(name)]
    counted = f"medians of {settings['rounds']} rounds" if settings["rounds"] > 1 else "1 round"
    return f"`{report['command']}` ({', '.join([machine['gpu'] or machine['processor'], threads, *versions])}; {counted}):"


def all_tables(folder: Path) -> str:
    """Of every file with a table; empty where there is none.

    Raises:
        ValueError: a file that is no report of a benchmark.
    """
    found = []
    for file in sorted(folder.glob("*.json")):
        try:
            report = json.loads(file.read_text())
            if report["benchmark"] in KINDS:  # others are kept as they are
                found.append(markdown(report))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}: no report of a benchmark ({type(error).__name__}: {error})") from error
    return "\n\n".join(found)


def between(text: str, tables: str) -> str:
    """The text with the tables in the place of what is between the marks.

    Raises:
        ValueError: the marks are not there once, in this order.
    """
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if text.count(BEGIN) != 1 or text.count(END) != 1 or END not in rest:
        raise ValueError(f"the marks {BEGIN} and {END} are wanted once, in this order")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}" if tables else f"{before}{BEGIN}\n{END}{after}"


def work(settings: Settings) -> None:
    tables = all_tables(settings.results)
    if settings.write is None:
        print(tables)
        return
    try:
        changed = between(settings.write.read_text(), tables)
    except ValueError as error:
        raise ValueError(f"{settings.write}: {error}") from error
    write_atomically(settings.write, changed.encode())


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
