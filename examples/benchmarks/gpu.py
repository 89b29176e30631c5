"""Measure the library on one GPU in a given time: tests, training steps, inference, constants, compiled steps, a study.

Parts run in the given order, the most important first. Results are written to the output folder after each part, as `gpu.json`,
pictures and a README.md, so that a killed run loses only the current part. If a part fails, this is recorded and the next part
runs; parts without enough time or with a missing package are also recorded. Without a GPU, or with `--dry_run`, everything is
tiny and the figures mean nothing.

    python examples/benchmarks/gpu.py --minutes 9 --output results/gpu
    python examples/benchmarks/gpu.py --minutes 4 --parts steps --workloads vit-bf16-128 sd15-bf16-8
    python examples/benchmarks/gpu.py --minutes 5 --parts compiled costs
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import gpu_report
from gpu_device import clocks, described
from gpu_session import Budget, Found, Session, tidy
from gpu_workloads import JOBS, Name
from rounds import check_positive, report, run, write

SCRIPT = "gpu.py"
Part = Literal["tests", "steps", "inference", "mixed", "costs", "compiled", "study"]
PARTS: dict[Part, Callable[[Session, Found, Settings], None]] = {
    "tests": lambda session, found, settings: _module("gpu_tests").part(session, found, settings.test_seconds),
    "steps": lambda session, found, settings: _module("gpu_steps").part(session, found, settings.workloads),
    "inference": lambda session, found, settings: _module("gpu_inference").part(session, found, settings.workloads),
    "mixed": lambda session, found, settings: _module("gpu_mixed").part(session, found, settings.workloads),
    "costs": lambda session, found, settings: _module("gpu_costs").part(session, found),
    "compiled": lambda session, found, settings: _module("gpu_steps").compiled_part(session, found, settings.workloads),
    "study": lambda session, found, settings: _module("gpu_study").part(session, found, settings.study_data),
}
LEAST: dict[Part, float] = {
    "tests": 10,
    "steps": 15,
    "inference": 15,
    "mixed": 25,
    "costs": 10,
    "compiled": 45,
    "study": 60,
}  # seconds
TO_END = 5.0  # seconds for the last pictures and tables
DRY_MINUTES = 3.0


@dataclass(frozen=True)
class Settings:
    """Measure what adapters cost on one GPU, within a given time."""

    minutes: float = 9.0
    """Minutes for all parts together; what does not fit is left out and listed."""
    output: Path = Path("results/gpu")
    """Folder for gpu.json, pictures and README.md."""
    parts: tuple[Part, ...] = tuple(PARTS)
    """Parts to run, in this order."""
    workloads: tuple[Name, ...] = JOBS
    """Model, precision and batch size for the parts steps, inference, mixed and compiled."""
    rounds: int = 10
    """Turns of each contender, if time allows."""
    test_seconds: int = 120
    """Seconds after which the tests are killed."""
    study_data: Path | None = None
    """Fashion-MNIST in torchvision's layout, for the part study."""
    dry_run: bool = False
    """Try the script with tiny models; implied without a GPU."""
    threads: int | None = None
    """Torch threads; by default torch's own choice."""

    def __post_init__(self) -> None:
        check_positive(self, "rounds", "test_seconds", "threads")
        if not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes}: expected a number above 0")


def _module(name: str) -> Any:
    """Import a part's module only when it runs, so that a missing package is recorded and the other parts still run."""
    return importlib.import_module(name)


def benchmark(settings: Settings) -> None:
    dry = settings.dry_run or not torch.cuda.is_available()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    found = report(SCRIPT, settings, date=time.strftime("%Y-%m-%d"), dry_run=dry, device=described(), parts={})

    def save() -> None:
        write(settings.output / "gpu.json", found)

    minutes = min(settings.minutes, DRY_MINUTES) if dry else settings.minutes
    session = Session(Budget(60 * minutes - TO_END), save, dry, 1 if dry else settings.rounds)
    print(gpu_report.heading(found), flush=True)
    for name in settings.parts:
        session.attempt(found["parts"], name, LEAST[name], partial(_part, name, session, settings))
        found["device"] |= {"clocks after": clocks()} if torch.cuda.is_available() else {}
        found["seconds left"] = round(session.budget.left + TO_END, 1)
        tidy()
        save()  # even if writing the pages fails
        found["pages"] = {}
        session.guarded(found["pages"], partial(_pages, found, settings.output))
        save()
        print(f"{name}: done, {session.budget.left:.0f} s left", flush=True)
    print(gpu_report.screen(found))


def _part(name: Part, session: Session, settings: Settings, found: Found) -> None:
    PARTS[name](session, found, settings)


def _pages(found: Found, folder: Path) -> None:
    found["pages"] |= gpu_report.written(folder, found)


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
