"""Edits by a pipeline in training: each image with the base model's edit, the adapter's, and the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from loca_vision.methods.by_name import title_of
from loca_vision.recipes.editing.data import pairs_of
from loca_vision.recipes.editing.edit import Sampling, edit, read_photograph, square
from loca_vision.recipes.editing.recipe import EditRecipe
from loca_vision.recipes.reports.contact_sheet import contact_sheet


@dataclass(frozen=True)
class Case:
    """An image to edit, in the recipe's resolution, with its instruction, its seed and, if known, the expected edit."""

    image: Image.Image
    prompt: str
    seed: int
    target: Image.Image | None = None


def cases_of(recipe: EditRecipe) -> list[Case]:
    """Return the validation images of a recipe: those it names, or some of the data set's split validation; possibly none.

    Raises:
        OSError, ValueError: a named image cannot be read.
    """
    seed, size = recipe.seed or 0, recipe.resolution
    if not recipe.validation_image:
        return _of_the_split(recipe, seed)
    targets: Sequence[str | None] = recipe.validation_target or [None] * len(recipe.validation_image)
    cases = []
    for place, wanted in zip(recipe.validation_image, targets, strict=True):
        image = square(read_photograph(place), size)
        target = None if wanted is None else square(read_photograph(wanted), size)
        cases += [Case(image, recipe.validation_prompt or "", seed + i, target) for i in range(recipe.num_validation_images)]
    return cases


def _of_the_split(recipe: EditRecipe, seed: int) -> list[Case]:
    try:
        if Path(recipe.train_data_dir or recipe.dataset_name or "").expanduser().is_file():
            raise FileNotFoundError("a single file, by whatever name of a split it is read, is what is trained on")
        pairs = pairs_of(recipe, "validation", None)
    except OSError:
        print("no validation pictures: neither --validation_image, nor a split validation in the data set")
        return []
    count, size = min(recipe.num_validation_images, len(pairs)), recipe.resolution
    chosen = [pairs[number * len(pairs) // count] for number in range(count)]  # neighbours may be crops of one photograph
    return [
        Case(square(one.original, size), recipe.validation_prompt or one.prompt, seed + i, square(one.edited, size))
        for i, one in enumerate(chosen)
    ]


class Validation:
    """Draws the cases on request; the base model's edits are drawn only once.

    Args:
        pipe: the pipeline, with the adapter in training.
        cases: at least one.
        sampling: how all edits are drawn.
        scales: scales of the adapter.
        method: the trained method, for the headings of the columns.
    """

    def __init__(self, pipe: Any, cases: Sequence[Case], sampling: Sampling, scales: Sequence[float], method: str) -> None:
        self.pipe, self.cases, self.sampling = pipe, cases, sampling
        self.scales, self.method = tuple(scales), method
        self._base: list[Image.Image] = []

    def edits(self, scale: float) -> list[Image.Image]:
        """Return the edit of every case, with the adapter at a scale."""
        return [edit(self.pipe, case.image, case.prompt, self.sampling, seed=case.seed, scale=scale) for case in self.cases]

    def sheet(self) -> Image.Image:
        """Return a grid with a row for each case; columns are image, base, adapter at each scale and any target."""
        self._base = self._base or self.edits(0)
        drawn = [self._base, *(self.edits(scale) for scale in self.scales)]
        targets = any(case.target for case in self.cases)
        rows = [
            [case.image, *edits, *([case.target] if targets else [])]
            for case, edits in zip(self.cases, zip(*drawn, strict=True), strict=True)
        ]
        heads = ["image", "base model", *(f"{title_of(self.method)} at {scale:g}" for scale in self.scales)]
        labels = [f"{case.prompt}\nseed {case.seed}" for case in self.cases]
        return contact_sheet(rows, columns=[*heads, *(["target"] if targets else [])], labels=labels)
