"""Time training steps in turns: each contender takes several steps in a row, as in training, before the next one follows.

On a GPU, the GPU's own clock is read between steps, so that no step waits for the one before it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from steps import Step
from workloads import device_here

LEAST_TURN = 0.4  # seconds; the start of a turn, for which a GPU waits, then matters little
MOST_STEPS = 10
PARTS = ("seconds", "forward and backward")


def steps_of_a_turn(seconds: float) -> int:
    """Return how many steps a turn has if one step takes this many seconds."""
    return max(1, min(MOST_STEPS, math.ceil(LEAST_TURN / max(seconds, 1e-9))))


def turn(step: Step, count: int) -> tuple[float, float]:
    """Take a turn and return seconds per step: with the optimiser's update, and of forward and backward only."""
    marks = [_mark()]
    for _ in range(count):
        step.gradients()
        marks.append(_mark())
        step.update()
        marks.append(_mark())
    if device_here().type == "cuda":
        torch.cuda.synchronize()
    gradients = sum(_between(*pair) for pair in zip(marks[0::2], marks[1::2], strict=False))
    return _between(marks[0], marks[-1]) / count, gradients / count


def _mark() -> Any:
    if device_here().type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _between(earlier: Any, later: Any) -> float:
    return float(earlier.elapsed_time(later)) / 1e3 if isinstance(earlier, torch.cuda.Event) else float(later - earlier)


def in_rounds(
    contenders: Mapping[str, Step],
    rounds: int,
    count: int,
    going: Callable[[], bool],
    safely: Callable[[str, Callable[[], object]], bool],
) -> dict[str, dict[str, list[float]]]:
    """Return both seconds of each contender in each round, for as many rounds as there is time for.

    Args:
        going: returns whether there is time for another round.
        safely: calls the turn of the named contender and returns False if it failed, which removes the contender.
    """
    found: dict[str, dict[str, list[float]]] = {name: {part: [] for part in PARTS} for name in contenders}
    for _ in range(rounds):
        if not going():
            break
        for name in list(found):
            taken: list[float] = []
            if safely(name, lambda name=name, taken=taken: taken.extend(turn(contenders[name], count))):  # type: ignore[misc]
                for part, seconds in zip(PARTS, taken, strict=True):
                    found[name][part].append(seconds)
            else:
                del found[name]
    return found
