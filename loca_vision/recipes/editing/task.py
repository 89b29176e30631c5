"""Training to follow instructions about images (InstructPix2Pix), as a task of the shared training code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from loca_vision.data.sampling import EpochSampler
from loca_vision.recipes.diffusion.draws import draws
from loca_vision.recipes.diffusion.errors import denoising_loss
from loca_vision.recipes.diffusion.task import Task
from loca_vision.recipes.editing.data import EditData, pairs_of
from loca_vision.recipes.editing.loss import without_conditioning
from loca_vision.recipes.editing.model_card import edit_card
from loca_vision.recipes.editing.models import EditModels
from loca_vision.recipes.editing.recipe import EditRecipe, sampling_of
from loca_vision.recipes.editing.validation import Validation, cases_of


class EditTask(Task):
    """Pairs of images, the loss of Brooks et al. (2023, equation 2), and edits as validation pictures."""

    noun: ClassVar[str] = "pairs"
    files_key: ClassVar[str] = "pair_files"
    tracker: ClassVar[str] = "instruct-pix2pix"

    def __init__(self, recipe: EditRecipe, accelerator: Accelerator) -> None:
        self._recipe, self.device = recipe, accelerator.device
        self.models = EditModels(recipe, accelerator)
        cases = cases_of(recipe) if accelerator.is_main_process else []
        self.data = EditData(recipe, self.models.encoders, accelerator)
        self.samples, self.digests = self.data.items, self.data.pairs.digests
        sampling = sampling_of(recipe)
        drawn = Validation(self.models.pipe, cases, sampling, recipe.validation_scales, recipe.method) if cases else None
        self.validation = drawn
        self.null_text = self.models.encoders.texts([""])["text"]
        self.models.encoders.rest(images=recipe.cache_latents, texts=recipe.cache_latents)

    @property
    def recipe(self) -> EditRecipe:
        return self._recipe

    @classmethod
    def digests_of(cls, recipe: EditRecipe) -> Mapping[str, str]:
        return pairs_of(recipe, "train", recipe.max_train_samples).digests

    def sampler(self, *, batch_size: int, rank: int, world_size: int) -> EpochSampler:
        of, pairs = self.recipe, len(self.data.pairs)
        if batch_size > pairs:
            raise ValueError(
                f"train_batch_size={of.train_batch_size}: a step takes {batch_size} pairs, with gradient_accumulation_steps="
                f"{of.gradient_accumulation_steps} in {world_size} processes, and there are {pairs}, too few for one batch"
            )
        return EpochSampler(pairs, batch_size=batch_size, seed=of.seed or 0, rank=rank, world_size=world_size)

    def loss(self, model: Callable[..., Any], batch: Mapping[str, Any], *, step: int, first: int) -> Tensor:
        of, family, process = self.recipe, self.models.family, self.models.family.process
        given = {name: value.to(self.device).float() for name, value in self.data.encode(batch).items()}
        moments, image = given.pop("edited"), given.pop("original")
        shape = moments.shape[2:]
        one = draws(len(image), shape, timestep=process.timestep, seed=of.seed or 0, step=step, first=first).to(self.device)
        latents = family.latents(moments, one.posterior)
        noisy, timesteps = process.noisy(latents, one.noise, one.timesteps)
        if of.conditioning_dropout_prob is not None:
            text = given["text"]
            given["text"], image = without_conditioning(text, image, self.null_text, one.dropout, of.conditioning_dropout_prob)
        sizes = self._sizes(len(image)) if family.sized else None
        prediction = self.models.predict(model, torch.cat([noisy, image], 1), timesteps, given, sizes)
        wanted = process.target(latents, one.noise, one.timesteps)
        return denoising_loss(prediction, wanted, process.weights(one.timesteps))

    def _sizes(self, count: int) -> Tensor:
        """Return the sizes for XL: each is a whole square of the resolution, as at inference and in diffusers' script."""
        side = self.recipe.resolution
        return torch.tensor([side, side, 0, 0, side, side], device=self.device, dtype=torch.float32).repeat(count, 1)

    @property
    def has_pictures(self) -> bool:
        return self.validation is not None

    def sheet(self) -> Image.Image:
        assert self.validation is not None
        with self.models.encoders.back(self.device):
            return self.validation.sheet()

    def facts(self) -> dict[str, Any]:
        pairs = self.data.pairs
        return {
            "pairs": len(pairs),
            "cut_instructions": len(self.data.cut_prompts),
            "example_prompt": self.recipe.validation_prompt or pairs[0].prompt,
            "pipeline": type(self.models.pipe).__name__,
        }

    @classmethod
    def card(cls, metrics: Mapping[str, Any], repository: str) -> str:
        return edit_card(metrics, repository)
