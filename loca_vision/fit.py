"""One training run of a classifier: steps, epochs, checkpoints, the best epoch, the test. On accelerate."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from loca_vision.checkpoint_folder import latest_checkpoint, read_checkpoint, write_checkpoint
from loca_vision.classification import Task, checksum, groups_of, has_locations, trained_tensors
from loca_vision.evaluation import accuracy_of, confusion
from loca_vision.optimizer_state import optimizer_tensors, restore_optimizer
from loca_vision.recipe import Recipe, differences
from loca_vision.sampling import EpochSampler, loader, stream_seed
from loca_vision.schedule import AlternatingSchedule
from loca_vision.settings import as_json_dict

_DROPOUT = 1  # a key of the stream of random numbers that the model itself draws
_FLUSH = 20  # steps after which losses are fetched from the device, which waits for it


@dataclass
class Progress:
    """How far a run has come; all of it goes into a checkpoint.

    Args:
        step: optimiser steps taken.
        curve: loss, rate and phase of each.
        epochs: of each one finished: its number from 1, mean loss, validation accuracy.
        best_epoch: counted from 0; the one whose weights are kept.
        stale: epochs since.
        seconds, waiting: spent in training, and of that in waiting for images.
    """

    step: int = 0
    curve: dict[str, list[Any]] = field(default_factory=lambda: {"loss": [], "lr": [], "phase": []})
    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    stale: int = 0
    seconds: float = 0.0
    waiting: float = 0.0


def accelerator_for(recipe: Recipe) -> Accelerator:
    """The one place that knows about processes, devices, precisions and trackers.

    Raises:
        ValueError: this device has not the precision, or the tracker is not installed.
    """
    precision = "no" if recipe.precision == "float32" else recipe.precision
    # Which halves of a spectrum have gradients changes from step to step.
    parallel = DistributedDataParallelKwargs(find_unused_parameters=recipe.method == "loca")
    log_with = None if recipe.report_to == "none" else recipe.report_to
    _check_tracker(recipe.report_to)
    if precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("precision='fp16': it needs a GPU; bf16 works on processors too")
    # Started as one of several processes, accelerate shares the work among them only where it knows on what.
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or torch.cuda.is_available()
    return Accelerator(
        cpu=not alone,
        mixed_precision=precision,
        log_with=log_with,
        project_dir=str(recipe.output_dir),
        kwargs_handlers=[parallel],
    )


def _check_tracker(name: str) -> None:
    """accelerate passes over one that is missing, and the curves would be lost."""
    there = {str(getattr(tracker, "value", tracker)) for tracker in get_available_trackers()}
    if name not in ("none", "all") and name not in there:
        raise ValueError(f"report_to={name!r}: it is not installed; python -m pip install {name}")
    if name == "all" and not there:
        raise ValueError("report_to='all': no tracker is installed; python -m pip install tensorboard")


class Run:
    """The training of one model with one seed.

    Random numbers are functions of (seed, epoch or step, process), and batches of (seed, epoch): a run that goes on from a
    checkpoint takes the very steps that it would have taken.
    """

    def __init__(self, task: Task, model: nn.Module, recipe: Recipe, folder: Path, accelerator: Accelerator) -> None:
        self.task, self.recipe, self.folder, self.accelerator = task, recipe, folder, accelerator
        self.seed = task.spec.seed
        self.sampler = EpochSampler(
            len(task.train),  # type: ignore[arg-type]
            batch_size=recipe.batch_size,
            seed=self.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        self.epoch_steps = len(self.sampler)
        self.total = self.epoch_steps * recipe.epochs
        self.model = model
        self.groups = groups_of(model, recipe)
        self.wrapped, self.optimizer = accelerator.prepare(model, torch.optim.AdamW(self.groups))
        self.moved = trained_tensors(model, self.groups)
        self.base = checksum(model, self.moved)
        self.schedule = self._schedule()
        self.decay = torch.optim.lr_scheduler.LambdaLR(self.optimizer.optimizer, self._rate)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self._fetched: list[Tensor] = []

    def _schedule(self) -> AlternatingSchedule | None:
        if not has_locations(self.model):
            return None
        of = self.recipe
        return AlternatingSchedule(
            self.wrapped,
            coefficient_steps=of.coefficient_steps,
            location_steps=of.location_steps,
            learning_steps=of.learning_steps,
            together=of.together,
        )

    def _rate(self, step: int) -> float:
        """The share of the rates at a step: up in a line while it warms up, then down to zero."""
        warm = self.recipe.warmup_steps
        return (step + 1) / (warm + 1) if step < warm else max(0.0, (self.total - step) / max(1, self.total - warm))

    # Steps

    def train(self) -> Progress:
        """All epochs from where the run stands, and the best epoch's weights in the model."""
        with tqdm(
            total=self.total,
            initial=self.progress.step,
            desc=f"seed {self.seed}",
            dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
        ) as bar:
            while self.progress.step < self.total and not self._enough():
                self._epoch(bar)
        if self.best:
            self._put(self.best)
        return self.progress

    def _enough(self) -> bool:
        """Whether to stop early."""
        return self.recipe.early_stop is not None and self.progress.stale >= self.recipe.early_stop

    def _epoch(self, bar: Any) -> None:
        epoch, done = divmod(self.progress.step, self.epoch_steps)
        if hasattr(self.task.train, "set_epoch"):
            self.task.train.set_epoch(epoch)
        self.sampler.set_epoch(epoch, start=done)
        self.wrapped.train()
        for images, labels in self._timed(loader(self.task.train, self.sampler, workers=self.task.workers)):
            phase = self.schedule.phase if self.schedule else None
            self.progress.curve["lr"].append(float(self.decay.get_last_lr()[0]))
            self.progress.curve["phase"].append(phase)
            self._fetched.append(self._step(images, labels))
            self.progress.step += 1
            bar.update()
            last = self.progress.step % self.epoch_steps == 0
            if last or len(self._fetched) == _FLUSH or self._checkpoint_due():
                self._flush(bar)
            if not last and self._checkpoint_due():
                self._save()
        self._judge(epoch)
        self._save()

    def _timed(self, batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches, and the seconds between the first wish for one and the end of the last step."""
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

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimiser step; the mean loss of this process's share of the batch, which stays on the device."""
        torch.manual_seed(stream_seed(self.seed, self.progress.step, self.accelerator.process_index, _DROPOUT))
        device, total = self.accelerator.device, images.new_zeros((), device=self.accelerator.device)
        parts = list(zip(images.chunk(self.recipe.accumulate), labels.chunk(self.recipe.accumulate), strict=True))
        for number, (some, theirs) in enumerate(parts, start=1):
            with self._sharing(number == len(parts)), self.accelerator.autocast():
                answers = self.wrapped(some.to(device, non_blocking=True))
                loss = F.cross_entropy(answers.float(), theirs.to(device, non_blocking=True), reduction="sum") / len(images)
                self.accelerator.backward(loss)
            total += loss.detach()
        if self.recipe.clip is not None:
            self.accelerator.clip_grad_norm_(self._parameters(), self.recipe.clip)
        self.optimizer.step()
        if not self.accelerator.optimizer_step_was_skipped:  # as when fp16 overflowed
            self.decay.step()
            if self.schedule:
                self.schedule.step()
        self.optimizer.zero_grad()
        return total

    def _sharing(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients go to the other processes with the last part of a batch only."""
        return nullcontext() if last else self.accelerator.no_sync(self.wrapped)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.groups for parameter in group["params"]]

    def _flush(self, bar: Any) -> None:
        """Fetch the losses of the last steps: the mean over processes."""
        losses = self.accelerator.reduce(torch.stack(self._fetched), reduction="mean").tolist()
        self._fetched.clear()
        first = len(self.progress.curve["loss"])
        for number, loss in enumerate(losses, start=first + 1):
            if not math.isfinite(loss):
                raise ValueError(f"the loss is {loss} at step {number}: training has diverged; try smaller learning rates")
        self.progress.curve["loss"] += losses
        bar.set_postfix(loss=f"{losses[-1]:.3f}", phase=self.progress.curve["phase"][-1] or "-", refresh=False)
        for number, loss in enumerate(losses, start=first):
            self.accelerator.log({"loss": loss, "lr": self.progress.curve["lr"][number]}, step=number + 1)

    # Epochs

    def _judge(self, epoch: int) -> None:
        """Validate, and keep the weights where they are the best so far."""
        found = accuracy_of(self.matrix(self.task.validation))
        mean = sum(self.progress.curve["loss"][-self.epoch_steps :]) / self.epoch_steps
        self.progress.epochs.append({"epoch": epoch + 1, "loss": mean, "validation_accuracy": found})
        self.accelerator.log({"validation_accuracy": found}, step=self.progress.step)
        best = self.progress.best_epoch
        if best is None or found > self.progress.epochs[best]["validation_accuracy"]:
            self.progress.best_epoch, self.progress.stale = epoch, 0
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.moved.items()}
        else:
            self.progress.stale += 1

    def matrix(self, images: Any) -> Tensor:
        """The confusion matrix over all processes."""
        share = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        mine = confusion(
            self.model,
            images,
            self.task.spec.classes,
            workers=self.task.workers,
            share=share,
            computing=self.accelerator.autocast(),
        )
        whole: Tensor = self.accelerator.reduce(mine.to(self.accelerator.device), reduction="sum")
        return whole.cpu()

    @torch.no_grad()
    def _put(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in self.moved.items():
            tensor.copy_(tensors[name])

    # Checkpoints

    def _checkpoint_due(self) -> bool:
        every = self.recipe.checkpoint_steps
        return every is not None and self.progress.step % every == 0

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            tensors, optimizer = optimizer_tensors(self.optimizer)
            tensors |= {f"model.{name}": tensor for name, tensor in self.moved.items()}
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
            scaler = self.accelerator.scaler
            state = {
                "recipe": as_json_dict(self.recipe),
                "base": self.base,
                "progress": vars(self.progress),
                "optimizer": optimizer,
                "decay": self.decay.last_epoch,
                "schedule": self.schedule.state_dict() if self.schedule else None,
                "scaler": scaler.state_dict() if scaler else None,
            }
            write_checkpoint(self.folder, self.progress.step, tensors, state, keep=self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Go on from the newest whole checkpoint in the folder; False where there is none.

        Raises:
            ValueError: it is of another recipe, or of other base weights; nothing is touched.
        """
        path = latest_checkpoint(self.folder)
        if path is None:
            return False
        tensors, state = read_checkpoint(path)
        for difference in differences(self.recipe, state["recipe"], as_json_dict(self.recipe)):
            raise ValueError(f"{path}: the run there has other settings: {difference}")
        if state["base"] != self.base:
            raise ValueError(f"{path}: the run there began with other weights of {self.task.spec.name}")
        restore_optimizer(self.optimizer, tensors, state["optimizer"])
        self._put({name: tensors[f"model.{name}"] for name in self.moved})
        self.best = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("best.")}
        self.progress = Progress(**state["progress"])
        _restore_decay(self.decay, state["decay"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return True


def _restore_decay(decay: torch.optim.lr_scheduler.LambdaLR, step: int) -> None:
    """The optimiser's rates are its own; the scheduler only has to know where it stands."""
    decay.last_epoch = step
    decay._last_lr = [group["lr"] for group in decay.optimizer.param_groups]


def peak_memory(device: torch.device) -> int:
    """Bytes: on a GPU of tensors, else of the whole process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
