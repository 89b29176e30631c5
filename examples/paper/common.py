"""Code shared by the scripts in this folder: the command line, and a JSON report that an interrupted command continues."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes
from tqdm import tqdm

from loca_vision.recipes.reports.environment import environment
from loca_vision.recipes.settings.console import run_command
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.strict_json import strict_json

Settings = TypeVar("Settings")


def run(script: str, kind: type[Settings], work: Callable[[Settings], object], arguments: Sequence[str] | None = None) -> int:
    """Run a script and return its exit status: 2, after a one-line message, for a user's mistake.

    Args:
        kind: the dataclass of the script's settings.
    """
    return run_command(script, kind, work, arguments, extra="train")


def measure_parts(
    file: Path, settings: Any, names: Sequence[str], measure: Callable[[str], dict[str, Any]], **identity: str
) -> dict[str, Any]:
    """Measure every part that `file` does not contain yet, and rewrite the file after each.

    Args:
        file: the report, in the folder `settings.output`.
        settings: the dataclass of all settings.
        names: the names of the parts.
        measure: returns the results of a part, for JSON. It must depend only on the settings and the part's name.
        identity: other values that must match to continue a report, such as digests of files.

    Returns:
        The report: settings, environment, minutes of computation, parts.

    Raises:
        ValueError: the file is a report with other settings, or not a report at all.
    """
    told = {name: value for name, value in asdict(settings).items() if name != "output" and not isinstance(value, Path)}
    report = _begin(file, json.loads(json.dumps(told | identity)))
    missing = [name for name in names if name not in report["parts"]]
    for name in tqdm(missing, desc=file.stem, unit="part", disable=None):
        started = time.perf_counter()
        report["parts"][name] = measure(name)
        report["minutes"] = round(report["minutes"] + (time.perf_counter() - started) / 60, 4)
        write_report(file, report)
    return report


def write_report(file: Path, report: dict[str, Any]) -> None:
    text = json.dumps(report, indent=1)
    # Put a list of numbers on one line instead of one line for each.
    write_atomically(file, (re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n").encode())


def _begin(file: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if not file.exists():
        return {"script": f"{file.stem}.py", "settings": settings, "environment": environment(), "minutes": 0.0, "parts": {}}
    try:
        report: dict[str, Any] = strict_json(file.read_text())
        known = report["settings"]
        report["parts"].keys(), report["minutes"] + 0.0
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file}: it is not a report of this script; choose another --output or remove it") from None
    if known != settings:
        differing = next(name for name in [*settings, *known] if settings.get(name) != known.get(name))
        raise ValueError(
            f"{file}: it was made with {differing}={known.get(differing)}, not {settings.get(differing)}; "
            "choose another --output or remove it"
        )
    return report


def plain(axes: Axes) -> Axes:
    """Hide the upper and right sides of the frame."""
    axes.spines[["top", "right"]].set_visible(False)
    return axes
