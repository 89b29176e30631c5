"""One training step of a method, its operator calls and memory, and a check of LoCA before it is timed."""

from __future__ import annotations

import gc
import multiprocessing
import resource
import sys
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from contenders import FLOOR, LOCA, methods, projections
from loca_vision import remove
from workloads import Job, Workload, on_tensors_of, settled, workload

TOLERANCE = 1e-4  # of the loss


class Step:
    """Forward, backward and update of one method's model; call it to take a step."""

    def __init__(self, model: nn.Module, work: Workload) -> None:
        self.model, self.work = model, work
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4) if self.trained else None  # the UNet's floor trains nothing

    def __call__(self) -> None:
        self.gradients()
        self.update()

    def update(self) -> None:
        if self.optimizer is not None:
            self.optimizer.step()

    def gradients(self) -> Tensor:
        """Run forward and backward only, and return the loss."""
        for tensor in (self.work.inputs, *self.trained):
            tensor.grad = None
        loss = self.work.loss(self.model)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def operators(step: Step) -> int:
    """Count the computing operators that forward and backward call; on a GPU, each is about one kernel.

    Calls inside torch's own operators do not count, but calls inside this library's operators do. Views and allocations do not
    count, nor does the optimiser's update, which a GPU does for all parameters together. One step is taken first, so that
    locations have moved as in the middle of training.
    """
    step()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        step.gradients()
    return sum(_count(event) for event in watched.events() if event.cpu_parent is None)


def _count(event: Any) -> int:
    return 1 if _computes(event.name) else sum(map(_count, event.cpu_children))


@cache
def _computes(name: str) -> bool:
    namespace, _, operator = name.partition("::")
    if namespace != "aten" or operator.startswith(("empty", "new_empty", "promote_types", "_unsafe_view")):
        return False
    packet = getattr(torch.ops.aten, operator)
    returned = [value.alias_info for overload in packet.overloads() for value in getattr(packet, overload)._schema.returns]
    return not any(alias is not None and not alias.is_write for alias in returned)


def all_operators(steps: dict[str, Step]) -> dict[str, dict[str, float]]:
    """Return, for each method, its operators, its projections, and the operators beyond the floor per projection."""
    found: dict[str, dict[str, float]] = {}
    for name, step in tqdm(steps.items(), desc="operators", disable=None):
        count, many = operators(step), projections(step.model)
        found[name] = {"operators": count, "projections": many}
        if many:
            found[name]["for each"] = (count - found[FLOOR]["operators"]) / many
    return found


def peak(job: Job, method: str) -> float:
    """Return the peak memory in MB during two steps of a method: of this process, or as allocated on a GPU."""
    job = settled(job)
    work = workload(job)
    step = Step(methods(job)[method](work), work)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # Linux resets the peak from building the model; elsewhere it counts
        Path("/proc/self/clear_refs").write_text("5")
    step()
    step()
    return torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else _resident_peak()


def _resident_peak() -> float:
    """Return the peak of this process alone: a child's `ru_maxrss` starts at the memory that its parent held."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def all_peaks(job: Job, names: list[str], threads: int) -> dict[str, float]:
    """Return the peak memory of each method in MB, each measured in its own process."""
    found = {}
    for name in tqdm(names, desc="memory", disable=None):
        with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (threads,)) as pool:
            found[name] = pool.apply(peak, (job, name))
    return found


def check(job: Job) -> dict[str, float]:
    """Return the float32 loss of LoCA's model on the batch by three paths that must agree, and the base's loss.

    Raises:
        RuntimeError: they differ by more than 1e-4, or LoCA changes the loss too little for the check to mean anything.
    """
    job = replace(job, autocast="none")
    work = workload(job)
    model = methods(job)[LOCA](work)
    found = {"training": float(Step(model, work).gradients())}
    with torch.no_grad():
        found["kept weights"] = float(work.loss(model))
        found["base"] = float(work.loss(work.base))
        merged = on_tensors_of(model, lambda name: "attn" in name)  # merging writes into the weights of attention
        del model
        remove(merged, merge=True)
        found["merged"] = float(work.loss(merged))
    _compare(found)
    return found


def _compare(losses: dict[str, float]) -> None:
    allowed = TOLERANCE * abs(losses["training"])
    for name in ("kept weights", "merged"):
        if not abs(losses[name] - losses["training"]) <= allowed:
            raise RuntimeError(f"LoCA's loss is {losses['training']:.6f} while training and {losses[name]:.6f} by {name}")
    base = losses["base"]
    if abs(base - losses["training"]) <= 3 * allowed:
        raise RuntimeError(f"LoCA changes the loss from {base:.6f} to {losses['training']:.6f}, too little to check anything")
