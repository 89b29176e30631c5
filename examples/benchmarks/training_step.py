"""Time one training step: every kind of adapter, and peft's LoRA and FourierFT, on one model, in one process.

Every method takes a turn in every round; the table shows medians, and the median of the ratios to the floor, which is forward
and backward through the frozen model, with a gradient at its input. Before anything is timed, LoCA's loss must be the same on
three paths. `--memory` adds the peak memory of a step, with each method in its own process, and `--operators` adds the number
of operators that a step calls.

    python examples/benchmarks/training_step.py --batch_size 8 --output step.json
    python examples/benchmarks/training_step.py --workload unet --memory --operators --autocast bfloat16
    python examples/benchmarks/training_step.py --only "LoRA r=16" "LoRA r=16, peft"
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from contenders import methods
from rounds import check_positive, in_turns, report, run, write
from steps import Step, all_operators, all_peaks, check
from table_rows import shown
from workloads import Job, settled, workload

SCRIPT = "training_step.py"


@dataclass(frozen=True)
class Settings(Job):
    """Time one training step of each method."""

    rounds: int = 7
    """Turns of each method, after a warm-up turn."""
    only: tuple[str, ...] = ()
    """Methods to time in addition to the floor, by their names in the table; by default all."""
    memory: bool = False
    """Also measure the peak memory of each method's step."""
    operators: bool = False
    """Also count the operators that each method's step calls."""
    threads: int | None = None
    """Torch threads; by default torch's own choice."""
    output: Path | None = None
    """JSON file for settings and seconds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "rounds", "threads")


def measure(settings: Settings) -> dict[str, Any]:
    """Return the check's losses and, for each method, seconds per round, trained numbers and any other requested figures."""
    chosen = methods(settings, settings.only)
    found: dict[str, Any] = {"losses": check(settings)}
    if settings.memory:  # while this process holds nothing
        found["peak MB"] = all_peaks(settings, list(chosen), torch.get_num_threads())
    work = workload(settings)
    steps = {name: Step(adapt(work), work) for name, adapt in chosen.items()}
    found["trained"] = {name: sum(tensor.numel() for tensor in step.trained) for name, step in steps.items()}
    if settings.operators:
        found["operators"] = all_operators(steps)
    return found | {"seconds": in_turns(steps, settings.rounds)}


def benchmark(given: Settings) -> None:
    settings = settled(given)
    methods(settings, settings.only)  # a wrong name is told before anything is computed
    if settings.threads:
        torch.set_num_threads(settings.threads)
    found = report(SCRIPT, settings, given, **measure(settings))
    write(settings.output, found)
    print(shown(found))


def main(arguments: Sequence[str] | None = None) -> int:
    return run(SCRIPT, Settings, benchmark, arguments)


if __name__ == "__main__":
    sys.exit(main())
