"""One training run of a classifier: epochs, checkpoints, the best epoch, the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from loca_vision.data.same_images import check_same_images, images_in
from loca_vision.data.sampling import EpochSampler, loader, stream_seed
from loca_vision.recipes.classification.accuracy import accuracy_of, confusion
from loca_vision.recipes.classification.recipe import Recipe, differences
from loca_vision.recipes.classification.task import Task, class_weights_of, groups_of
from loca_vision.recipes.settings.command_line import as_json_dict
from loca_vision.recipes.training.first_locations import spent_on_locations
from loca_vision.recipes.training.stepper import Progress, Stepper
from loca_vision.storage.run_checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint

_DROPOUT = 1  # key of the stream of random numbers that the model itself draws


@dataclass
class EpochProgress(Progress):
    """How far a run has come.

    Args:
        epochs: for each finished epoch: its number from 1, mean loss, validation accuracy.
        best_epoch: counted from 0; the epoch whose weights are kept.
        stale: number of epochs since then.
    """

    epochs: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    stale: int = 0


class Run:
    """The training of one model with one seed.

    Random numbers are functions of (seed, epoch or step, process), and batches of (seed, epoch): a run that continues from a
    checkpoint takes the very steps that it would have taken.
    """

    def __init__(self, task: Task, model: nn.Module, recipe: Recipe, folder: Path, accelerator: Accelerator) -> None:
        assert recipe.batch_size is not None
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
        self.spent = spent_on_locations(recipe.location_init, recipe.location_batches, self.epoch_steps, "an epoch")
        self.model, self.progress = model, EpochProgress()
        self.groups = groups_of(model, recipe)
        self.stepper = Stepper(
            model,
            torch.optim.AdamW(self.groups),
            accelerator,
            self.progress,
            scheduler=lambda optimizer: LambdaLR(optimizer, self._rate),
            phases={
                name: getattr(recipe, name) for name in ("coefficient_steps", "location_steps", "learning_steps", "together")
            },
            clip=recipe.clip,
        )
        self.best: dict[str, Tensor] = {}
        weights = class_weights_of(task, recipe)
        self.cross_entropy = nn.CrossEntropyLoss(
            None if weights is None else weights.to(accelerator.device), reduction="sum", label_smoothing=recipe.label_smoothing
        )

    def _rate(self, step: int) -> float:
        """Return the factor of the rates at a step: it rises linearly during warmup, then falls linearly to zero."""
        warm, total = self.recipe.warmup_steps, self.total - self.spent
        return (step + 1) / (warm + 1) if step < warm else max(0.0, (total - step) / max(1, total - warm))

    # Steps

    def train(self) -> EpochProgress:
        """Train all remaining epochs, and put the best epoch's weights into the model."""
        with tqdm(
            total=self.total,
            initial=self.progress.step,
            desc=f"seed {self.seed}",
            dynamic_ncols=True,
            disable=not self.accelerator.is_main_process,
        ) as bar:
            if self.progress.step < self.spent:
                self._choose_locations(bar)
            while self.progress.step < self.total and not self._enough():
                self._epoch(bar)
        if self.best:
            self.stepper.put(self.best)
        return self.progress

    def _enough(self) -> bool:
        """Return whether to stop early."""
        return self.recipe.early_stop is not None and self.progress.stale >= self.recipe.early_stop

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the batches left in the epoch, after putting the model into training mode."""
        epoch, done = divmod(self.progress.step, self.epoch_steps)
        if hasattr(self.task.train, "set_epoch"):
            self.task.train.set_epoch(epoch)
        self.sampler.set_epoch(epoch, start=done)
        self.stepper.wrapped.train()
        return self.stepper.timed(loader(self.task.train, self.sampler, workers=self.task.workers))

    def _choose_locations(self, bar: Any) -> None:
        """Choose locations by the first batches of the first epoch."""

        def batches() -> Iterator[list[Callable[[], Tensor]]]:
            for images, labels in islice(self._batches(), self.spent):
                yield self._parts(self.model, images, labels)
                bar.update()

        self.stepper.choose_locations(batches(), self.recipe.location_rule)

    def _epoch(self, bar: Any) -> None:
        epoch = self.progress.step // self.epoch_steps
        for images, labels in self._batches():
            self.stepper.step(self._parts(self.stepper.wrapped, images, labels))
            bar.update()
            last = self.progress.step % self.epoch_steps == 0
            self.stepper.flush(bar, now=last or self._checkpoint_due())
            if not last and self._checkpoint_due():
                self._save()
        self._judge(epoch)
        self._save()

    def _parts(self, model: nn.Module, images: Tensor, labels: Tensor) -> list[Callable[[], Tensor]]:
        """Return the losses of the parts of a batch, whose sum is the loss of this process's share."""
        torch.manual_seed(stream_seed(self.seed, self.progress.step, self.accelerator.process_index, _DROPOUT))
        device, whole = self.accelerator.device, len(images)

        def loss(some: Tensor, theirs: Tensor) -> Tensor:
            answers = model(some.to(device, non_blocking=True))
            targets = theirs.to(device, non_blocking=True)
            lost: Tensor = self.cross_entropy(answers.float(), targets)
            return lost / whole

        parts = zip(images.chunk(self.recipe.accumulate), labels.chunk(self.recipe.accumulate), strict=True)
        return [partial(loss, *part) for part in parts]

    # Epochs

    def _judge(self, epoch: int) -> None:
        """Validate, and keep the weights if they are the best so far."""
        accuracy = accuracy_of(self.matrix(self.task.validation))
        mean = sum(self.progress.curve["loss"][-self.epoch_steps :]) / self.epoch_steps
        self.progress.epochs.append({"epoch": epoch + 1, "loss": mean, "validation_accuracy": accuracy})
        self.accelerator.log({"validation_accuracy": accuracy}, step=self.progress.step)
        best = self.progress.best_epoch
        if best is None or accuracy > self.progress.epochs[best]["validation_accuracy"]:
            self.progress.best_epoch, self.progress.stale = epoch, 0
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self.stepper.moved.items()}
        else:
            self.progress.stale += 1

    def matrix(self, images: Any) -> Tensor:
        """Return the confusion matrix over all processes."""
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

    # Checkpoints

    def _checkpoint_due(self) -> bool:
        every = self.recipe.checkpoint_steps
        return every is not None and self.progress.step % every == 0

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            tensors, state = self.stepper.state()
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
            state |= {"recipe": as_json_dict(self.recipe), "images": images_in(self.task.splits)}
            write_checkpoint(self.folder, self.progress.step, tensors, state, keep=self.recipe.keep_checkpoints)
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint in the folder; return False if there is none.

        Raises:
            ValueError: it is of another recipe, of other images or of other base weights; nothing is changed.
        """
        path = latest_checkpoint(self.folder)
        if path is None:
            return False
        tensors, state = read_checkpoint(path)
        for difference in differences(self.recipe, state["recipe"], as_json_dict(self.recipe)):
            raise ValueError(f"{path}: the run there has other settings: {difference}")
        check_same_images(path, state.get("images"), images_in(self.task.splits))
        try:
            self.stepper.restore(tensors, state)
        except ValueError as error:
            raise ValueError(f"{path}: {error} ({self.task.spec.name})") from error
        self.best = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("best.")}
        return True
