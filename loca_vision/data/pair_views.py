"""Turn a pair of images into tensors: one size, one crop and one flip for both, as a function of (seed, epoch, index)."""

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
    """How a pair is viewed: the original is resized to `size` pixels on its short side, and a square is cropped from it.

    The edited image is first brought to the original's size, whatever its own is.

    Args:
        size: side of the square in pixels.
        crop: "center", or "random" for another square in each epoch.
        flip: mirror half of the pairs in each epoch.

    Raises:
        ValueError: the size is below 1, or the crop is unknown.
    """

    size: int
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        _ = self.of_one  # checks the fields

    @property
    def of_one(self) -> BucketView:
        """The view of a single image."""
        return BucketView((self.size, self.size), self.crop, self.flip)

    @property
    def all(self) -> tuple[Drawn, ...]:
        """Every possible view of a pair; none if they cannot be counted."""
        return self.of_one.all

    def drawn(self, seed: int, epoch: int, index: int) -> Drawn:
        """Return the view of a pair in an epoch, which depends on nothing but the arguments."""
        return self.of_one.drawn(seed, epoch, index)

    def pixels(self, pair: Pair, drawn: Drawn) -> Tensor:
        """Return (2, 3, size, size) uint8: the original and the edited image in the same view."""
        view, whole = self.of_one, self.of_one.whole(pair.original.size)
        return torch.stack([view.part(image, whole, drawn) for image in (pair.original, pair.edited)])


def scaled(pixels: Tensor) -> Tensor:
    """Scale bytes to what an autoencoder takes: float32 in [-1, 1]."""
    return 2 * (pixels.float() / 255) - 1


class PairItem(TypedDict):
    """Both images, (3, size, size) float32 in [-1, 1], and the instruction."""

    original: Tensor
    edited: Tensor
    prompt: str


class PairTensors(Dataset[PairItem]):
    """Pairs as tensors, each in the view drawn by (seed, epoch, index)."""

    def __init__(self, pairs: Dataset[Pair], view: View, seed: int) -> None:
        self.pairs, self.view, self.seed, self.epoch = pairs, view, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, before the DataLoader's iterator is made: its workers use a copy of this set."""
        self.epoch = epoch

    def __len__(self) -> int:
        pairs: Any = self.pairs
        return len(pairs)

    def __getitem__(self, index: int) -> PairItem:
        pair = self.pairs[index]
        original, edited = scaled(self.view.pixels(pair, self.view.drawn(self.seed, self.epoch, index)))
        return {"original": original, "edited": edited, "prompt": pair.prompt}
