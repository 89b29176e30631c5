"""From a pair of images to tensors: one size, one crop and one flip for both, as a function of (seed, epoch, index)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from loca_vision.data.buckets import BucketView, Drawn
from loca_vision.data.pairs import Pair

__all__ = ["Drawn", "PairItem", "PairTensors", "View", "scaled"]


@dataclass(frozen=True)
class View:
    """How a pair is looked at: the original's short side becomes `size` pixels, and of that comes a square.

    The edited image is brought to the original's size first, whatever its own is.

    Args:
        size: pixels a side.
        crop: "center", or "random", another square in each epoch.
        flip: mirror half of the pairs in each epoch.

    Raises:
        ValueError: a size below 1, or another crop.
    """

    size: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        _ = self.of_one  # checks the fields

    @property
    def of_one(self) -> BucketView:
        """How one image is looked at."""
        return BucketView((self.size, self.size), self.crop, self.flip)

    @property
    def all(self) -> tuple[Drawn, ...]:
        """Every view that there is of a pair; none where they cannot be counted."""
        return self.of_one.all

    def drawn(self, seed: int, epoch: int, index: int) -> Drawn:
        """The view of a pair in an epoch: a function of the arguments alone."""
        return self.of_one.drawn(seed, epoch, index)

    def pixels(self, pair: Pair, drawn: Drawn) -> Tensor:
        """(2, 3, size, size) uint8: the original and the edited image, looked at alike."""
        view, whole = self.of_one, self.of_one.whole(pair.original.size)
        return torch.stack([view.part(image, whole, drawn) for image in (pair.original, pair.edited)])


def scaled(pixels: Tensor) -> Tensor:
    """Bytes as an autoencoder takes them: float32 in [-1, 1]."""
    return 2 * (pixels.float() / 255) - 1


class PairItem(TypedDict):
    """(3, size, size) float32 in [-1, 1] of both images, and the instruction."""

    original: Tensor
    edited: Tensor
    prompt: str


class PairTensors(Dataset[PairItem]):
    """Pairs as tensors, each in the view that (seed, epoch, index) gives it."""

    def __init__(self, pairs: Dataset[Pair], view: View, seed: int) -> None:
        self.pairs, self.view, self.seed, self.epoch = pairs, view, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, before the DataLoader's iterator is made: its workers work on a copy of this set."""
        self.epoch = epoch

    def __len__(self) -> int:
        pairs: Any = self.pairs
        return len(pairs)

    def __getitem__(self, index: int) -> PairItem:
        pair = self.pairs[index]
        original, edited = scaled(self.view.pixels(pair, self.view.drawn(self.seed, self.epoch, index)))
        return {"original": original, "edited": edited, "prompt": pair.prompt}
