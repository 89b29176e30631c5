"""One training run of InstructPix2Pix: steps, averages, validation pictures, checkpoints."""

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
from loca_vision.data.sampling import EpochSampler, loader, stream_seed
from loca_vision.recipes.editing.data import EditData, check_same_pairs
from loca_vision.recipes.editing.loss import (
    denoising_loss,
    draws,
    min_snr_weights,
    sampled,
    signal_to_noise,
    target,
    without_conditioning,
)
from loca_vision.recipes.editing.models import EditModels
from loca_vision.recipes.editing.recipe import EditRecipe, batch_of, differences, phases_of
from loca_vision.recipes.editing.validation import Validation
from loca_vision.recipes.settings.command_line import as_json_dict
from loca_vision.recipes.training.ema import EMA, Decay, locations_among
from loca_vision.recipes.training.stepper import Progress, Stepper
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.run_checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint

_DROPOUT = 2  # a key of the stream of random numbers that the UNet itself draws


class EditRun:
    """The training of one UNet.

    Everything drawn is a function of (seed, epoch, pair) or (seed, step, place in the batch of all processes): a run that goes
    on from a checkpoint takes the very steps that it would have taken, and several processes take those of one.

    Args:
        models, data: of the recipe.
        recipe: settled, with its seed.
        accelerator: of `accelerator_for`.
        validation: of the main process; None for no pictures.

    Raises:
        ValueError: there are fewer pairs than a step takes.
    """

    def __init__(
        self,
        models: EditModels,
        data: EditData,
        recipe: EditRecipe,
        accelerator: Accelerator,
        validation: Validation | None = None,
    ) -> None:
        self.models, self.data, self.recipe, self.accelerator = models, data, recipe, accelerator
        self.validation, self.seed, self.progress = validation, recipe.seed or 0, Progress()
        self.sampler = self._sampler()
        self.epoch_steps = len(self.sampler)
        self.total = recipe.max_train_steps or self.epoch_steps * recipe.num_train_epochs
        self.null_text = models.encoders.embeddings([""])
        self.stepper = self._stepper()
        taken = locations_among(models.pipe.unet, self.stepper.moved)
        self.ema = EMA(self.stepper.moved, Decay(recipe.ema_decay), taken=taken) if recipe.use_ema else None

    def _sampler(self) -> EpochSampler:
        recipe, processes, pairs = self.recipe, self.accelerator.num_processes, len(self.data.pairs)
        batch = batch_of(recipe, processes)
        if batch > pairs:
            raise ValueError(
                f"train_batch_size={recipe.train_batch_size}: a step takes {batch} pairs, with gradient_accumulation_steps="
                f"{recipe.gradient_accumulation_steps} in {processes} processes, and there are {pairs}, too few for one batch"
            )
        rank = self.accelerator.process_index
        return EpochSampler(pairs, batch_size=batch, seed=self.seed, rank=rank, world_size=processes)

    def _stepper(self) -> Stepper:
        recipe = self.recipe
        rates = {"num_warmup_steps": recipe.lr_warmup_steps, "num_training_steps": self.total}
        return Stepper(
            self.models.pipe.unet,
            self.models.optimizer(self.accelerator.num_processes),
            self.accelerator,
            self.progress,
            scheduler=partial(get_scheduler, recipe.lr_scheduler, **rates),
            phases=phases_of(recipe),
            clip=recipe.max_grad_norm,
        )

    # Steps

    def train(self) -> Progress:
        """All steps from where the run stands, with pictures and checkpoints on the way."""
        with tqdm(
            total=self.total,
            initial=self.progress.step,
            desc=self.recipe.method,
            dynamic_ncols=True,
            disable=None if self.accelerator.is_main_process else True,
        ) as bar:
            while self.progress.step < self.total:
                self._epoch(bar)
        return self.progress

    def _epoch(self, bar: Any) -> None:
        epoch, done = divmod(self.progress.step, self.epoch_steps)
        items: Any = self.data.items
        items.set_epoch(epoch)
        self.sampler.set_epoch(epoch, start=done)
        self.stepper.wrapped.train()
        batches = loader(items, self.sampler, workers=self.recipe.dataloader_num_workers)
        for batch in self.stepper.timed(islice(batches, self.total - self.progress.step)):
            torch.manual_seed(stream_seed(self.seed, self.progress.step, self.accelerator.process_index, _DROPOUT))
            self.stepper.step(self._parts(batch))
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

    def _parts(self, batch: Mapping[str, Any]) -> list[Callable[[], Tensor]]:
        """The losses of the accumulated parts, their mean being the batch's."""
        size, count = self.recipe.train_batch_size, self.recipe.gradient_accumulation_steps
        first = self.accelerator.process_index * size * count
        cuts = range(0, size * count, size)
        return [
            partial(self._loss, {name: value[cut : cut + size] for name, value in batch.items()}, first + cut) for cut in cuts
        ]

    def _loss(self, items: Mapping[str, Any], first: int) -> Tensor:
        """Of some pairs of which the first has that place in the batch of all processes (Brooks et al., 2023, equation 2)."""
        recipe, device, scheduler = self.recipe, self.accelerator.device, self.models.scheduler
        given = self.data.encode(items)
        moments, image, text = (given[name].to(device).float() for name in ("edited", "original", "text"))
        one = draws(
            len(image),
            self.models.latent_shape,
            timesteps=scheduler.config.num_train_timesteps,
            seed=self.seed,
            step=self.progress.step,
            first=first,
        ).to(device)
        latents = sampled(moments, one.posterior, self.models.pipe.vae.config.scaling_factor)
        noisy = scheduler.add_noise(latents, one.noise, one.timesteps)
        if recipe.conditioning_dropout_prob is not None:
            text, image = without_conditioning(text, image, self.null_text, one.dropout, recipe.conditioning_dropout_prob)
        prediction = self.stepper.wrapped(torch.cat([noisy, image], 1), one.timesteps, text).sample
        weights = None
        if recipe.snr_gamma is not None:
            snr = signal_to_noise(scheduler, one.timesteps)
            weights = min_snr_weights(snr, recipe.snr_gamma, scheduler.config.prediction_type)
        wanted = target(scheduler, latents, one.noise, one.timesteps)
        return denoising_loss(prediction, wanted, weights) / recipe.gradient_accumulation_steps

    # Pictures

    def _pictures_due(self) -> bool:
        """The same in all processes, which wait for the one that draws, and have agreed on their losses before."""
        every = self.recipe.validation_steps or self.recipe.validation_epochs * self.epoch_steps
        return self.progress.step % every == 0

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, what is validated and saved is in the UNet: the averages, where there are any."""
        if self.ema is None:
            yield
            return
        with self.ema.applied():
            yield

    def draw(self) -> None:
        """The validation pictures as the run stands, in the output folder and with the trackers."""
        if self.accelerator.is_main_process and self.validation is not None:
            with self.averaged(), self.accelerator.autocast():
                sheet = self.validation.sheet()
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
            state |= {"recipe": saved_settings(self.recipe), "taken": self._taken(), "files": self.data.pairs.digests}
            limit = self.recipe.checkpoints_total_limit
            write_checkpoint(self.recipe.output_dir, self.progress.step, tensors, state, keep=limit)
        self.accelerator.wait_for_everyone()

    def resume(self) -> bool:
        """Go on from the checkpoint that the recipe names; False if it names the latest and there is no checkpoint.

        Raises:
            FileNotFoundError, ValueError, OSError: it cannot be read, or is of another recipe, another number of pairs, other
                batches or other base weights, or has more steps than this run; nothing is touched.
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
        """What decides which pairs a step takes, apart from the settings: the data set and the number of processes."""
        return {"pairs": len(self.data.pairs), "batch_size": self.sampler.batch_size}

    def _check_same(self, path: Path, state: Mapping[str, Any]) -> None:
        for difference in differences(self.recipe, settings_in(path, state), saved_settings(self.recipe)):
            raise ValueError(f"{path}: the run there has other settings: {difference}")
        for name, now in self._taken().items():
            if state["taken"][name] != now:
                raise ValueError(
                    f"{path}: {name}={now}, {state['taken'][name]} before; of all {self.accelerator.num_processes} processes "
                    "together a step takes other pairs than the run there did"
                )
        check_same_pairs(path, state.get("files"), self.data.pairs.digests)
        done = state["progress"]["step"]
        if done > self.total:
            raise ValueError(f"{path}: {done} steps are taken there, and this run is to have {self.total}")


def settings_in(path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the run that wrote a checkpoint.

    Raises:
        ValueError: another script wrote it.
    """
    settings = state.get("recipe")
    if not isinstance(settings, dict) or "edit_prompt_column" not in settings or "taken" not in state:
        raise ValueError(f"{path}: it is a checkpoint, but not of InstructPix2Pix training by this version")
    return settings


def checkpoint_of(recipe: EditRecipe) -> Path | None:
    """The checkpoint that a recipe goes on from; None where it does not, or where it is the latest of none.

    A mere name, such as checkpoint-500, is one in the output folder, as for diffusers' scripts, unless it is here.

    Raises:
        FileNotFoundError: it names one that is not there.
    """
    if recipe.resume_from_checkpoint in (None, "latest"):
        return latest_checkpoint(recipe.output_dir) if recipe.resume_from_checkpoint else None
    path = Path(str(recipe.resume_from_checkpoint)).expanduser()
    if not path.is_dir() and len(path.parts) == 1 and (recipe.output_dir / path).is_dir():
        return recipe.output_dir / path
    if not path.is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint={str(path)!r}: there is no such folder")
    return path


def saved_settings(recipe: EditRecipe) -> dict[str, Any]:
    """As JSON, but for the token, which nobody else may see."""
    return as_json_dict(recipe) | {"hub_token": None}
