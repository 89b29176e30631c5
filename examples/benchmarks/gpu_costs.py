"""Fit the cost model's constants on this device: time each way of a cosine update on a small grid, and print the line."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from statistics import median

import torch

import paths
from gpu_session import Found, Session, tidy
from workloads import device_here

SIZES = ("768x768", "320x320", "1280x1280", "3072x768")
TOKENS, COMPONENTS = (6304, 1024, 25216), (1000, 3000, 10000)
MOST_SECONDS = 60.0


def part(session: Session, found: Found) -> None:
    """Time as many cases as possible, spread over the grid; `found["line"]` can be pasted into the cost model."""
    settings = paths.Settings(
        sizes=SIZES[:1] if session.dry else SIZES,
        tokens=(64,) if session.dry else TOKENS,
        components=(300,) if session.dry else COMPONENTS,
        projections=(1,),
        repeats=1 if session.dry else 5,
        threads=torch.get_num_threads(),
        device="cuda" if device_here().type == "cuda" else "cpu",
    )
    end = session.budget.left - MOST_SECONDS
    torch.manual_seed(settings.seed)
    timed: list[paths.Timed] = []
    grid = sorted(paths.cases(settings), key=lambda case: case.phase)
    for case in _spread(grid):
        if session.budget.left < max(end, 0.0):
            break
        timed.append(paths.timed(case, settings))
        tidy()
    costs = paths.of_device(paths.fitted(timed), device_here())
    found["cases"] = [paths.as_json(one) for one in timed]
    found["cases left out"] = len(grid) - len(timed)
    found["fastest"] = dict(Counter(min(one.seconds, key=lambda way, of=one: of.seconds[way]) for one in timed if one.seconds))  # type: ignore[misc]
    found["error of the fit"] = round(median(paths.errors(timed, costs)), 3)
    found["failing ways"] = {way: why for one in timed for way, why in one.failed.items()}
    found["costs"], found["line"] = asdict(costs), paths.to_paste(costs, settings.device)


def _spread(grid: list[paths.Case]) -> list[paths.Case]:
    """Reorder the grid so that the first half of the cases also covers all of it."""
    return grid[::2] + grid[1::2]
