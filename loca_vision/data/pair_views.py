"""From a pair of images to tensors: one size, one crop and one flip for both, as a function of (seed, epoch, index)."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from loca_vision.checks import check_count
from loca_vision.data.pairs import Pair
from loca_vision.data.sampling import stream_seed

_VIEW = 11  # a key of the stream of random numbers


class Drawn(NamedTuple):
    """Where the crop lies, as shares of the way from left to right and top to bottom, and whether it is mirrored."""

    across: float = 0.5
    down: float = 0.5
    flipped: bool = False


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
        check_count("size", self.size)
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop={self.crop!r}: the choices are 'center' and 'random'")

    @property
    def all(self) -> tuple[Drawn, ...]:
        """Every view that there is of a pair; none where they cannot be counted."""
        if self.crop == "random":
            return ()
        return (Drawn(), Drawn(flipped=True)) if self.flip else (Drawn(),)

    def drawn(self, seed: int, epoch: int, index: int) -> Drawn:
        """The view of a pair in an epoch: a function of the arguments alone."""
        draws = random.Random(stream_seed(seed, epoch, index, _VIEW))
        flipped, across, down = draws.random() < 0.5, draws.random(), draws.random()
        at = (across, down) if self.crop == "random" else (0.5, 0.5)
        return Drawn(*at, flipped=self.flip and flipped)

    def pixels(self, pair: Pair, drawn: Drawn) -> Tensor:
        """(2, 3, size, size) uint8: the original and the edited image, looked at alike."""
        width, height = pair.original.size
        factor = self.size / min(width, height)
        whole = (max(self.size, round(width * factor)), max(self.size, round(height * factor)))
        return torch.stack([self._part(image, whole, drawn) for image in (pair.original, pair.edited)])

    def _part(self, image: Image.Image, whole: tuple[int, int], drawn: Drawn) -> Tensor:
        image = image if image.size == whole else image.resize(whole, Image.Resampling.BICUBIC)
        left, top = (round(share * (side - self.size)) for share, side in zip(drawn[:2], whole, strict=True))
        part = image.crop((left, top, left + self.size, top + self.size))
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn.flipped else part
        return torch.from_numpy(np.array(part.convert("RGB"))).permute(2, 0, 1).contiguous()


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
