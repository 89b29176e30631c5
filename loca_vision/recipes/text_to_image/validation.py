"""Pictures by a pipeline in training: the base's, and the adapter's at several scales."""

from __future__ import annotations

import torch
from PIL import Image

from loca_vision.methods.by_name import title_of
from loca_vision.recipes.diffusion.drawing import pictures
from loca_vision.recipes.diffusion.models import Models
from loca_vision.recipes.reports.contact_sheet import contact_sheet
from loca_vision.recipes.text_to_image.recipe import ImageRecipe, picture_of


class Validation:
    """Draws the validation prompt on request; the base's pictures are drawn only once.

    Args:
        models: the pipeline, with the adapters in training.
        recipe: a recipe with a `validation_prompt`.
        device: the device to draw on.
    """

    def __init__(self, models: Models, recipe: ImageRecipe, device: torch.device) -> None:
        self.models, self.recipe, self.device = models, recipe, device
        first = recipe.seed or 0
        self.seeds = [first + number for number in range(recipe.num_validation_images)]
        self.how = picture_of(recipe, models.family.call_settings())
        self._base: list[Image.Image] = []

    def drawn(self, scale: float) -> list[Image.Image]:
        """Return a picture for each seed, with the adapters at a scale."""
        prompt = self.recipe.validation_prompt or ""
        return [pictures(self.models.pipe, prompt, [seed], self.how, scale=scale)[0] for seed in self.seeds]

    def sheet(self) -> Image.Image:
        """Return a grid with a column for the base and for each scale of the adapter, and a row for each seed."""
        with self.models.encoders.back(self.device):
            self._base = self._base or self.drawn(0)
            columns = [self._base, *(self.drawn(scale) for scale in self.recipe.validation_scales)]
        heads = ["base model", *(f"{title_of(self.recipe.method)} at {scale:g}" for scale in self.recipe.validation_scales)]
        labels = [f"{self.recipe.validation_prompt}\nseed {seed}" for seed in self.seeds]
        return contact_sheet(list(zip(*columns, strict=True)), columns=heads, labels=labels)
