"""Training on a subject, a style or a concept, as a task of the shared training code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from loca_vision.data.sampling import BucketSampler, stream_seed
from loca_vision.recipes.diffusion.denoising import Denoising
from loca_vision.recipes.diffusion.draws import Draws, draws
from loca_vision.recipes.diffusion.errors import squared_errors
from loca_vision.recipes.diffusion.families.family import Texts
from loca_vision.recipes.diffusion.task import Task
from loca_vision.recipes.text_to_image.class_pictures import draw_class_images
from loca_vision.recipes.text_to_image.data import ImageData, digests_of, images_of, prior_of
from loca_vision.recipes.text_to_image.model_card import image_card
from loca_vision.recipes.text_to_image.models import ImageModels
from loca_vision.recipes.text_to_image.recipe import ImageRecipe
from loca_vision.recipes.text_to_image.validation import Validation

_CLASS = 31  # a key of the stream of random numbers: noise of class images


class ImageTask(Task):
    """Images with captions, with DreamBooth's prior preservation (Ruiz et al., 2023) if requested."""

    noun: ClassVar[str] = "images"
    files_key: ClassVar[str] = "image_files"
    tracker: ClassVar[str] = "text-to-image"

    def __init__(self, recipe: ImageRecipe, accelerator: Accelerator) -> None:
        self._recipe, self.device = recipe, accelerator.device
        with accelerator.main_process_first():  # before models are loaded and class images generated, which takes a while
            images = images_of(recipe)
        self.models = ImageModels(recipe, accelerator)
        draw_class_images(recipe, self.models, accelerator)
        self.data = ImageData(recipe, images, self.models.encoders, accelerator)
        self.samples, self.digests = self.data.samples, self.data.digests
        self.validation = Validation(self.models, recipe, accelerator.device) if recipe.validation_prompt else None
        self.models.encoders.rest(images=recipe.cache_latents, texts=not recipe.train_text_encoder)

    @property
    def recipe(self) -> ImageRecipe:
        return self._recipe

    @classmethod
    def digests_of(cls, recipe: ImageRecipe) -> Mapping[str, str]:
        return digests_of(images_of(recipe), prior_of(recipe))

    def sampler(self, *, batch_size: int, rank: int, world_size: int) -> BucketSampler:
        plan = self.data.plan
        buckets = [plan.bucket(index) for index in range(len(plan))]
        return BucketSampler(buckets, batch_size=batch_size, seed=self.recipe.seed or 0, rank=rank, world_size=world_size)

    def loss(self, model: Callable[..., Any], batch: Mapping[str, Any], *, step: int, first: int) -> Tensor:
        family, process = self.models.family, self.models.family.process
        moments = self.data.moments(batch).to(self.device).float()
        count, parts = moments.shape[:2]
        one = self._draws(count, parts, family.latent_shape(moments.shape[3:]), step, first)
        moments = moments.transpose(0, 1).flatten(0, 1)  # images to learn, then those of the class
        latents = family.latents(moments, one.posterior)
        noisy, timesteps = process.noisy(latents, one.noise, one.timesteps)
        sizes = batch["sizes"].to(self.device).transpose(0, 1).flatten(0, 1) if family.sized else None
        texts = self._texts(batch, parts, one.dropout[:count] < self.recipe.caption_dropout)
        prediction = self.models.predict(model, noisy, timesteps, texts, sizes)
        errors = squared_errors(prediction, process.target(latents, one.noise, one.timesteps))
        return self._mean(errors, process.weights(one.timesteps), count)

    def _mean(self, errors: Tensor, weights: Tensor | None, count: int) -> Tensor:
        """Return the mean over the images to learn, plus the weighted mean over those of the class."""
        if weights is not None and isinstance(self.models.family.process, Denoising):
            weights[count:] = 1  # as in diffusers' scripts, SNR weights are only for the images to learn
        errors = errors if weights is None else errors * weights
        loss = errors[:count].mean()
        return loss if len(errors) == count else loss + self.recipe.prior_loss_weight * errors[count:].mean()

    def _draws(self, count: int, parts: int, shape: tuple[int, ...], step: int, first: int) -> Draws:
        """Return the draws for the images to learn, followed by those for images of the class."""
        seed, timestep = self.recipe.seed or 0, self.models.family.process.timestep
        seeds = [seed, stream_seed(seed, _CLASS)][:parts]
        offset = self.recipe.noise_offset
        found = [draws(count, shape, timestep=timestep, seed=one, step=step, first=first, noise_offset=offset) for one in seeds]
        return Draws(*(torch.cat(same) for same in zip(*(vars(one).values() for one in found), strict=True))).to(self.device)

    def _texts(self, batch: Mapping[str, Any], parts: int, dropped: Tensor) -> Texts | list[str]:
        """Return the encoded captions for the denoiser, or the captions themselves if text encoders are trained."""
        captions, prompt = batch["caption"], self.recipe.class_prompt or ""
        if self.data.texts is None:
            shown = ["" if drop else caption for caption, drop in zip(captions, dropped.tolist(), strict=True)]
            return shown + [prompt] * len(captions) * (parts - 1)
        empty, of_class = self._known(""), self._known(prompt)
        found = {}
        for name, nothing in empty.items():
            own = batch[name].to(self.device)
            mask = dropped.to(own.device).view(-1, *[1] * (own.ndim - 1))
            own = torch.where(mask, nothing, own)
            others = of_class[name].expand(len(own) * (parts - 1), *own.shape[1:])
            found[name] = torch.cat([own, others]).float()
        return found

    def _known(self, text: str) -> Texts:
        """Return the encoded class text or empty text, kept on the device because every step needs both."""
        if text not in self._constant:
            assert self.data.texts is not None
            self._constant[text] = {name: value.to(self.device) for name, value in self.data.texts[text].items()}
        return self._constant[text]

    @cached_property
    def _constant(self) -> dict[str, Texts]:
        return {}

    @property
    def has_pictures(self) -> bool:
        return self.recipe.validation_prompt is not None

    def sheet(self) -> Image.Image:
        assert self.validation is not None
        return self.validation.sheet()

    def facts(self) -> dict[str, Any]:
        images = self.data.images
        prior = {"class_images": len(self.data.prior)} if self.data.prior is not None else {}
        return {
            "images": len(images),
            "cut_captions": len(self.data.cut_captions),
            "example_prompt": self.recipe.validation_prompt or self.recipe.instance_prompt or images.captions[0],
            "pipeline": type(self.models.pipe).__name__,
            "call_settings": self.models.family.call_settings(),
            **prior,
        }

    @classmethod
    def card(cls, metrics: Mapping[str, Any], repository: str) -> str:
        return image_card(metrics, repository)
