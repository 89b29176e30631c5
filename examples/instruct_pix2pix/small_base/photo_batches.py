"""Batches of small square crops of a few photographs, as a function of (seed, step), so that training can be resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from loca_vision.data.images import open_image
from loca_vision.data.pair_views import scaled
from loca_vision.data.photographs import Photograph
from loca_vision.data.sampling import stream_seed

ZOOMS = (1.0, 1.5, 2.0, 2.5)  # short sides of the copies, in crop sides: crops of 0.4 to 1 of a photograph
_SATURATION, _BRIGHTNESS = (0.5, 1.6), (0.7, 1.2)  # factors; a few photographs have few colours
_PART = 31  # the key of the random number stream


@dataclass(frozen=True)
class PhotoBatches:
    """Crops of photographs at several sizes, mirrored or not, with weaker or stronger colours.

    Args:
        copies: the resized copies of every photograph, (3, h, w) uint8 each, with h and w of at least `size`.
        size: pixels per side of a crop.
        seed: the seed of the random draws.
    """

    copies: Sequence[Sequence[Tensor]]
    size: int
    seed: int

    @staticmethod
    def of(photographs: Sequence[Photograph], size: int, seed: int) -> PhotoBatches:
        """Read each photograph once and keep small copies in memory. Photographs smaller than a crop are enlarged to one.

        Raises:
            ValueError: a file cannot be read as an image.
        """
        bar = tqdm(photographs, desc="photographs", dynamic_ncols=True, disable=None)
        return PhotoBatches([_copies(photograph, size) for photograph in bar], size, seed)

    def batch(self, step: int, count: int) -> Tensor:
        """Return a batch (count, 3, size, size), float32 in [-1, 1]. All photographs are equally likely."""
        draws = torch.Generator().manual_seed(stream_seed(self.seed, step, _PART))
        return torch.stack([self._part(draws) for _ in range(count)])

    def _part(self, draws: torch.Generator) -> Tensor:
        which, zoom, down, across, flipped, saturation, brightness = torch.rand(7, generator=draws).tolist()
        copies = self.copies[int(which * len(self.copies))]
        copy = copies[int(zoom * len(copies))]
        top, left = (int(at * (side - self.size + 1)) for at, side in zip((down, across), copy.shape[1:], strict=True))
        part = scaled(copy[:, top : top + self.size, left : left + self.size])
        part = part.flip(2) if flipped < 0.5 else part
        grey = part.mean(0, keepdim=True)
        coloured = grey + _between(saturation, _SATURATION) * (part - grey)
        return ((coloured + 1) * _between(brightness, _BRIGHTNESS) - 1).clamp(-1, 1)


def _between(share: float, ends: tuple[float, float]) -> float:
    return ends[0] + share * (ends[1] - ends[0])


def _copies(photograph: Photograph, size: int) -> list[Tensor]:
    image = ImageOps.exif_transpose(open_image(photograph.file)).convert("RGB")
    sides = [round(size * zoom) for zoom in ZOOMS]
    return [_shrunk(image, side) for side in sides if side <= max(size, min(image.size))]


def _shrunk(image: Image.Image, short: int) -> Tensor:
    """Resize an image so that its short side has `short` pixels."""
    factor = short / min(image.size)
    size: Any = tuple(max(short, round(side * factor)) for side in image.size)
    return torch.from_numpy(np.array(image.resize(size, Image.Resampling.LANCZOS))).permute(2, 0, 1).contiguous()
