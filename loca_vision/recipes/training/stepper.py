"""Optimiser steps on accelerate: parts of a batch, shared gradients, clipping, rates, phases, the curve, and their state."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from loca_vision.model.schedule import AlternatingSchedule
from loca_vision.model.select_locations import select_locations
from loca_vision.recipes.training.optimizer_state import optimizer_tensors, restore_optimizer
from loca_vision.recipes.training.trained_tensors import checksum, has_locations, trained_tensors

FLUSH = 20  # steps between fetches of the losses, for which the host waits for the device
# How long processes wait for the one that encodes a data set or draws pictures; NCCL fails after 10 minutes by default.
_WAITING = timedelta(days=2)

Batch = TypeVar("Batch")


class Diverged(ValueError):
    """The loss is not finite."""


@dataclass
class Progress:
    """How far a run has come; all of it goes into a checkpoint.

    Args:
        step: number of optimiser steps taken.
        curve: loss, rate and phase of each step.
        seconds, waiting: time spent training, and the part of it spent waiting for data.
    """

    step: int = 0
    curve: dict[str, list[Any]] = field(default_factory=lambda: {"loss": [], "lr": [], "phase": []})
    seconds: float = 0.0
    waiting: float = 0.0


def accelerator_for(*, precision: str | None, report_to: str, folder: Path, moving: bool) -> Accelerator:
    """Make the accelerator: the only place that knows about processes, devices, precisions and trackers.

    Args:
        precision: "no", "bf16", "fp16", or None for what `accelerate launch` says.
        report_to: "none", "all", or a tracker's name.
        folder: the folder of the run.
        moving: whether the set of parameters that have gradients changes from step to step, as with halves of spectra.

    Raises:
        ValueError: this device does not support the precision, the tracker is not installed, or accelerate is configured for a
            kind of training that splits a model.
    """
    _check_tracker(report_to)
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise ValueError(f"accelerate is configured for {name}: here processes share data, and no model is cut")
    precision = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("fp16: this precision needs a GPU; bf16 works on processors too")
    # If started as one of several processes, accelerate shares the work among them only if it knows the device.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.cuda.is_available()
    return Accelerator(
        cpu=not alone,
        mixed_precision=precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),  # the losses are divided already
        log_with=None if report_to == "none" else report_to,
        project_dir=str(folder),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=moving),
            InitProcessGroupKwargs(timeout=_WAITING),
        ],
    )


def _check_tracker(name: str) -> None:
    """Refuse a missing tracker: accelerate would ignore it, and the curves would be lost."""
    there = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    if name not in ("none", "all") and name not in there:
        raise ValueError(f"report_to={name!r}: it is not installed; python -m pip install {name}")
    if name == "all" and not there:
        raise ValueError("report_to='all': no tracker is installed; python -m pip install tensorboard")


def end_trackers(accelerator: Accelerator) -> None:
    """End the trackers of one run; `end_training` would also end the process group."""
    for tracker in accelerator.trackers:
        tracker.finish()
    accelerator.trackers = []
    accelerator.free_memory()
    accelerator.wait_for_everyone()


class Stepper:
    """Takes the optimiser steps of a run, and holds everything that a checkpoint needs.

    Args:
        model: the model with its adapter; with several processes `wrapped` is what shares its gradients.
        optimizer: the optimiser over what is trained.
        accelerator: from `accelerator_for`.
        progress: the progress of the run, which is updated.
        scheduler: makes the schedule of the rates, given the optimiser.
        phases: settings of an AlternatingSchedule, which is made if locations are trained.
        clip: the largest norm of all gradients together; None for no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        accelerator: Accelerator,
        progress: Progress,
        *,
        scheduler: Callable[[Optimizer], LambdaLR],
        phases: Mapping[str, Any],
        clip: float | None,
    ) -> None:
        self.model, self.accelerator, self.progress, self.clip = model, accelerator, progress, clip
        self.decay = scheduler(optimizer)  # before accelerate wraps the optimiser for fp16: torch warns of the other order
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.moved = trained_tensors(model, optimizer.param_groups)
        self.base = checksum(model, self.moved)
        self.schedule = AlternatingSchedule(self.wrapped, **phases) if has_locations(model) else None
        self._fetched: list[Tensor] = []

    def step(self, parts: Sequence[Callable[[], Tensor]]) -> None:
        """Take one optimiser step.

        Args:
            parts: functions that return, under autocast, the loss of a part of this process's share of the batch. Their sum is
                the share's loss, and the mean over processes is the batch's.
        """
        self.progress.curve["lr"].append(float(self.decay.get_last_lr()[0]))
        self.progress.curve["phase"].append(self.schedule.phase if self.schedule else None)
        total = torch.zeros((), device=self.accelerator.device)
        for number, part in enumerate(parts, start=1):
            with self._sharing(number == len(parts)), self.accelerator.autocast():
                loss = part()
                self.accelerator.backward(loss)
            total += loss.detach()
        if self.clip is not None:
            self.accelerator.clip_grad_norm_(self._parameters(), self.clip)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # skipped if fp16 overflowed, for example
            self.decay.step()
            if self.schedule:
                self.schedule.step()
        self.optimizer.zero_grad()
        self._fetched.append(total)
        self.progress.step += 1

    def choose_locations(self, batches: Iterable[Sequence[Callable[[], Tensor]]], rule: Literal["largest", "sampled"]) -> None:
        """Spend a step on each batch without training anything, then put components at cells chosen by the gradient.

        Args:
            batches: for each batch the losses of its parts, as in `step`, computed with `model` and not with `wrapped`.
            rule: how cells are chosen, as in `select_locations`.
        """

        def losses() -> Iterator[Tensor]:
            for parts in batches:
                self.progress.curve["lr"].append(0.0)
                self.progress.curve["phase"].append(None)
                total = torch.zeros((), device=self.accelerator.device)
                for part in parts:
                    with self.accelerator.autocast():
                        loss = part()
                    total += loss.detach()
                    yield loss
                self._fetched.append(total)
                self.progress.step += 1

        select_locations(self.model, losses(), rule=rule)

    def _sharing(self, last: bool) -> AbstractContextManager[Any]:
        """Share gradients with the other processes only at the last part of a batch."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def flush(self, bar: Any, *, now: bool = True) -> None:
        """Fetch the losses of the last steps, averaged over processes; unless `now`, only if there are enough of them.

        Raises:
            Diverged: a loss is not finite.
        """
        if not self._fetched or (not now and len(self._fetched) < FLUSH):
            return
        losses = self.accelerator.reduce(torch.stack(self._fetched), reduction="mean").tolist()
        self._fetched.clear()
        curve = self.progress.curve
        first = len(curve["loss"])
        for number, loss in enumerate(losses, start=first + 1):
            if not math.isfinite(loss):
                raise Diverged(f"the loss is {loss} at step {number}: training has diverged; try smaller learning rates")
        curve["loss"] += losses
        bar.set_postfix(loss=f"{losses[-1]:.3f}", phase=curve["phase"][-1] or "-", refresh=False)
        for number, loss in enumerate(losses, start=first):
            self.accelerator.log({"loss": loss, "lr": curve["lr"][number]}, step=number + 1)

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the time spent inside, between two steps, from the training time."""
        began = time.perf_counter()
        yield
        self.progress.seconds -= time.perf_counter() - began

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield the batches, and measure the time from the first request to the end of the last step."""
        began = time.perf_counter()
        iterator = iter(batches)
        while True:
            wished = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                break
            finally:
                self.progress.waiting += time.perf_counter() - wished
            yield batch
            self.progress.seconds += time.perf_counter() - began
            began = time.perf_counter()

    # On disk

    @torch.no_grad()
    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Set what is trained to the tensors of these names."""
        for name, tensor in self.moved.items():
            tensor.copy_(tensors[name])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state for a checkpoint: tensors, and everything else as JSON."""
        tensors, optimizer = optimizer_tensors(self.optimizer)
        tensors |= {f"model.{name}": tensor for name, tensor in self.moved.items()}
        scaler = self.accelerator.scaler
        return tensors, {
            "base": self.base,
            "progress": vars(self.progress),
            "optimizer": optimizer,
            "decay": self.decay.last_epoch,
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "scaler": scaler.state_dict() if scaler else None,
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, to the same numbers.

        Raises:
            ValueError: it is for a model that began with other weights, or for another optimiser; nothing is changed.
        """
        if state["base"] != self.base:
            raise ValueError("the run there began with other weights of the model")
        restore_optimizer(self.optimizer, tensors, state["optimizer"])
        self.put({name: tensors[f"model.{name}"] for name in self.moved})
        vars(self.progress).update(state["progress"])
        self.decay.last_epoch = state["decay"]  # the rates themselves are in the optimiser
        self.decay._last_lr = [group["lr"] for group in self.optimizer.param_groups]
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])


def peak_memory(device: torch.device) -> int:
    """Return bytes: on a GPU those of tensors, otherwise those of the whole process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
