"""One training run: steps, averages, validation pictures, checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from loca_vision.data.images import as_png
from loca_vision.data.sampling import loader, stream_seed
from loca_vision.recipes.diffusion.checks import batch_of, phases_of
from loca_vision.recipes.diffusion.resuming import check_same_samples, check_same_settings, checkpoint_of, saved_settings
from loca_vision.recipes.diffusion.task import Task
from loca_vision.recipes.training.ema import EMA, Decay, locations_among
from loca_vision.recipes.training.first_locations import spent_on_locations
from loca_vision.recipes.training.stepper import Progress, Stepper
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.run_checkpoint import read_checkpoint, write_checkpoint

_DROPOUT = 2  # key of the stream of random numbers that the denoiser itself draws


class Run:
    """The training of one denoiser, and of the text encoders that are trained with it.

    All random numbers are a function of (seed, epoch, sample) or (seed, step, place in the batch of all processes): a run that
    continues from a checkpoint takes the very steps that it would have taken, and several processes take those of one.

    Args:
        task: the task to train for.
        accelerator: from `accelerator_for`.

    Raises:
        ValueError: there are fewer samples than a step takes.
    """

    def __init__(self, task: Task, accelerator: Accelerator) -> None:
        self.task, self.recipe, self.models, self.accelerator = task, task.recipe, task.models, accelerator
        self.seed, self.progress = self.recipe.seed or 0, Progress()
        self.sampler = task.sampler(
            batch_size=batch_of(self.recipe, accelerator.num_processes),
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        self.epoch_steps = len(self.sampler)
        self.total = self.recipe.max_train_steps or self.epoch_steps * self.recipe.num_train_epochs
        self.spent = spent_on_locations(self.recipe.location_init, self.recipe.location_batches, self.total, "the run")
        self.stepper = self._stepper()
        taken = locations_among(self.models.trained, self.stepper.moved)
        decay = Decay(self.recipe.ema_decay)
        self.ema = EMA(self.stepper.moved, decay, taken=taken) if self.recipe.use_ema else None

    def _stepper(self) -> Stepper:
        recipe = self.recipe
        rates = {"num_warmup_steps": recipe.lr_warmup_steps, "num_training_steps": self.total - self.spent}
        return Stepper(
            self.models.trained,
            self.models.optimizer(self.accelerator.num_processes),
            self.accelerator,
            self.progress,
            scheduler=partial(get_scheduler, recipe.lr_scheduler, **rates),
            phases=phases_of(recipe),
            clip=recipe.max_grad_norm,
        )

    # Steps

    def train(self) -> Progress:
        """Take all remaining steps, with pictures and checkpoints on the way."""
        with tqdm(
            total=self.total,
            initial=self.progress.step,
            desc=self.recipe.method,
            dynamic_ncols=True,
            disable=None if self.accelerator.is_main_process else True,
        ) as bar:
            if self.progress.step < self.spent:
                self.stepper.choose_locations(self._first_batches(bar), self.recipe.location_rule)
            while self.progress.step < self.total:
                self._epoch(bar)
        return self.progress

    def _batches(self, until: int) -> Iterator[Mapping[str, Any]]:
        """Yield the batches of the epoch up to a step of the run, seeding the denoiser's random numbers for each."""
        epoch, done = divmod(self.progress.step, self.epoch_steps)
        samples: Any = self.task.samples
        samples.set_epoch(epoch)
        self.sampler.set_epoch(epoch, start=done)
        self.stepper.wrapped.train()
        batches = loader(samples, self.sampler, workers=self.recipe.dataloader_num_workers)
        for batch in self.stepper.timed(islice(batches, until - self.progress.step)):
            torch.manual_seed(stream_seed(self.seed, self.progress.step, self.accelerator.process_index, _DROPOUT))
            yield batch

    def _first_batches(self, bar: Any) -> Iterator[list[Callable[[], Tensor]]]:
        """Yield the losses of the batches by which locations are chosen."""
        while self.progress.step < self.spent:
            for batch in self._batches(self.spent):
                yield self._parts(self.stepper.model, batch)
                bar.update()

    def _epoch(self, bar: Any) -> None:
        for batch in self._batches(self.total):
            self.stepper.step(self._parts(self.stepper.wrapped, batch))
            if self.ema:
                self.ema.step()
            bar.update()
            last = self.progress.step == self.total
            kept = self.progress.step % self.recipe.checkpointing_steps == 0
            self.stepper.flush(bar, now=last or kept or self._pictures_due())
            with self.stepper.untimed():
                if kept or last:
                    self._save()
                if self._pictures_due() and not last:
                    self.draw()

    def _parts(self, model: Any, batch: Mapping[str, Any]) -> list[Callable[[], Tensor]]:
        """Return the losses of the accumulated parts, divided so that their sum is the loss of this process's share."""
        size, count = self.recipe.train_batch_size, self.recipe.gradient_accumulation_steps
        first = self.accelerator.process_index * size * count
        cuts = range(0, size * count, size)
        return [
            partial(self._loss, model, {name: value[cut : cut + size] for name, value in batch.items()}, first + cut)
            for cut in cuts
        ]

    def _loss(self, model: Any, batch: Mapping[str, Any], first: int) -> Tensor:
        loss = self.task.loss(model, batch, step=self.progress.step, first=first)
        return loss / self.recipe.gradient_accumulation_steps

    # Pictures

    def _pictures_due(self) -> bool:
        """Return whether pictures are due: the same in all processes, which have agreed on their losses and wait for the one
        that draws."""
        every = self.recipe.validation_steps or self.recipe.validation_epochs * self.epoch_steps
        return self.progress.step % every == 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put what is validated and saved into the models inside the `with`: the averages, if there are any."""
        if self.ema is None:
            yield
            return
        with self.ema.applied():
            yield

    def draw(self) -> None:
        """Draw the validation pictures of the run's current state, for the output folder and the trackers."""
        if self.accelerator.is_main_process and self.task.has_pictures:
            with self.averaged(), self.accelerator.autocast():
                sheet = self.task.sheet()
            write_atomically(self.recipe.output_dir / f"validation-{self.progress.step}.png", as_png(sheet))
            self._track(sheet)
        self.accelerator.wait_for_everyone()

    def _track(self, sheet: Image.Image) -> None:
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"validation": np.asarray(sheet)[None]}, self.progress.step, dataformats="NHWC")
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"validation": [sheet]}, self.progress.step)

    # Checkpoints

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            tensors, state = self.stepper.state()
            tensors |= self.ema.state() if self.ema else {}
            state |= {"recipe": saved_settings(self.recipe), "taken": self._taken(), "files": self.task.digests}
            limit = self.recipe.checkpoints_total_limit
            write_checkpoint(self.recipe.output_dir, self.progress.step, tensors, state, keep=limit)
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Continue from the checkpoint that the recipe names; return False if it names the latest and there is none.

        Raises:
            FileNotFoundError, ValueError, OSError: it cannot be read, is of another recipe, another number of samples, other
                batches or other base weights, or has more steps than this run; nothing is changed.
        """
        path = checkpoint_of(self.recipe)
        if path is None:
            return False
        tensors, state = read_checkpoint(path)
        self._check_same(path, state)
        try:
            self.stepper.restore(tensors, state)
            if self.ema:
                self.ema.restore({name: value.to(self.accelerator.device) for name, value in tensors.items()})
        except ValueError as error:
            raise ValueError(f"{path}: {error} ({self.recipe.pretrained_model_name_or_path})") from error
        return True

    def _taken(self) -> dict[str, int]:
        """Return what decides which samples a step takes, apart from the settings: the numbers of samples and of a batch."""
        return {self.task.noun: len(self.task.samples), "batch_size": self.sampler.batch_size}

    def _check_same(self, path: Path, state: Mapping[str, Any]) -> None:
        check_same_settings(path, state, self.recipe)
        for name, now in self._taken().items():
            before = state["taken"].get(name)
            if before != now:
                raise ValueError(
                    f"{path}: {name}={now}, {before} before; of all {self.accelerator.num_processes} processes together "
                    f"a step takes other {self.task.noun} than the run there did"
                )
        check_same_samples(path, state.get("files"), self.task.digests, self.task.noun)
        done = state["progress"]["step"]
        if done > self.total:
            raise ValueError(f"{path}: {done} steps are taken there, and this run is to have {self.total}")
