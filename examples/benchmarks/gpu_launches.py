"""Count what forward and backward of a step launch on a GPU: kernels, copies, and the time that the GPU is busy with them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from steps import Step, operators
from workloads import device_here

LONGEST = 8  # kernels that are named
COPIES = ("Memcpy", "Memset")


def launches(step: Step) -> dict[str, Any]:
    """Count the launches of one step without the optimiser's update; without a GPU, count the operators that compute.

    One step is taken first, so that locations have moved as in the middle of training.
    """
    if device_here().type == "cpu":
        return {"operators": operators(step)}
    step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        step.gradients()
        torch.cuda.synchronize()
    return counted(_ran(watched))


def _ran(watched: profile) -> list[tuple[str, float]]:
    """Return names and microseconds of what ran on the GPU, from the raw record: torch's own list is slow to build."""
    recorded: Any = watched.profiler
    events = [event for event in recorded.kineto_results.events() if event.device_type() != DeviceType.CPU]
    return [(event.name(), event.duration_ns() / 1e3) for event in events if not event.is_user_annotation()]


def counted(events: list[tuple[str, float]]) -> dict[str, Any]:
    """Summarise the names and microseconds of what ran on the GPU."""
    copies = [taken for name, taken in events if name.startswith(COPIES)]
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, taken in events:
        by_name[name].append(taken)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {
        "kernels": len(events) - len(copies),
        "copies": len(copies),
        "busy ms": round(sum(taken for _, taken in events) / 1e3, 4),
        "longest": [[name[:90], len(taken), round(sum(taken) / 1e3, 4)] for name, taken in longest],
    }
