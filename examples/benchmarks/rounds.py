"""Code shared by the benchmarks: turns in rounds, medians, ratios to the floor within each round, and result files.

Every method has a turn in every round, so that drifting machine speed affects all of them equally. With one thread, seconds are
CPU time, so that other work on the machine disturbs them less.
"""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from loca_vision.recipes.reports.environment import environment
from loca_vision.recipes.settings.console import run_command
from loca_vision.storage.atomic_file import write_atomically

Settings = TypeVar("Settings")
Name = TypeVar("Name", bound=str)


def run(script: str, kind: type[Settings], work: Callable[[Settings], object], arguments: Sequence[str] | None = None) -> int:
    """Run a script and return its exit status: 2, after a one-line message, for a user's mistake.

    Args:
        kind: the dataclass of the script's settings.
    """
    return run_command(script, kind, work, arguments, extra="benchmark")


def check_positive(settings: Any, *names: str) -> None:
    """Check that settings are at least 1.

    Raises:
        ValueError: a setting, or one of its numbers, is below 1.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and min(value if isinstance(value, tuple) else (value,), default=0) < 1:
            raise ValueError(f"{name}={value}: whole numbers from 1 up")


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds of one call, including everything that it started on a GPU."""
    on_gpu = torch.cuda.is_available()
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    started = clock()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return clock() - started


def in_turns(calls: Mapping[Name, Callable[[], object]], rounds: int, *, bar: bool = True) -> dict[Name, list[float]]:
    """Return the seconds of each call in each round, after a warm-up round."""
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for counted in tqdm([False] + [True] * rounds, unit="round", disable=None if bar else True):
        for name, call in calls.items():
            seconds[name] += [seconds_of(call)] * counted
    return seconds


def ratio(own: Sequence[float], floor: Sequence[float]) -> float:
    """Return the median of the ratios within each round."""
    return median(mine / least for mine, least in zip(own, floor, strict=True))


def report(script: str, settings: Any, given: Any = None, **found: Any) -> dict[str, Any]:
    """Return the contents of a results file: the command, its settings, the machine, and the results.

    Args:
        settings: the dataclass with all fields set.
        given: the dataclass from the command line, if it left fields open.
    """
    asked = {name: value for name, value in asdict(settings).items() if name != "output"}  # paths are private
    about = {"command": command(script, given or settings), "settings": asked, "environment": machine()}
    return {"benchmark": script.removesuffix(".py"), **about, **found}


def machine() -> dict[str, Any]:
    """Return versions, the processor, and the number of threads used."""
    return {**environment(), "peft": _version("peft"), "processor": _processor()}


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def command(script: str, settings: Any) -> str:
    """Return the command line for these settings, without the defaults."""
    words = ["python", f"examples/benchmarks/{script}"]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{field.name}" if value else f"--no_{field.name}")
        elif isinstance(value, Path):
            words += [f"--{field.name}", value.name]  # without its folder
        else:
            words += [f"--{field.name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return shlex.join(words)


def write(path: Path | None, found: Mapping[str, Any]) -> None:
    """Write results as JSON atomically; do nothing without a path."""
    if path is not None:
        write_atomically(path, (json.dumps(found, indent=1) + "\n").encode())
