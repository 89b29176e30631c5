"""Buckets for images of several shapes: the sizes, the one that suits an image, and the view of an image at its size."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from loca_vision.checks import check_count, is_finite
from loca_vision.data.sampling import stream_seed

Size = tuple[int, int]
"""(height, width) in pixels, as in diffusers' `--aspect_ratio_buckets`."""
_VIEW = 11  # a key of the stream of random numbers
_LEAST_SIDE = 64


def parse_buckets(text: str, divisor: int) -> tuple[Size, ...]:
    """Parse sizes from a text such as "1024,1024;768,1280", each height,width.

    Args:
        divisor: the number that every side must be a multiple of for the model.

    Raises:
        ValueError: it is not a list of sizes, a side is not a multiple of `divisor`, or a size occurs twice.
    """
    check_count("divisor", divisor)
    sizes: list[Size] = []
    for part in text.split(";"):
        sides = re.fullmatch(r"\s*([0-9]{1,6})\s*,\s*([0-9]{1,6})\s*", part)
        if not sides:
            raise ValueError(f'buckets={text[:200]!r}: expected sizes such as "1024,1024;768,1280", got {part[:50]!r}')
        size = (int(sides[1]), int(sides[2]))
        if any(side < 1 or side % divisor for side in size):
            raise ValueError(f"buckets={text[:200]!r}: expected sides that are multiples of {divisor}, got {part.strip()!r}")
        if size in sizes:
            raise ValueError(f"buckets={text[:200]!r}: {part.strip()!r} comes twice")
        sizes.append(size)
    return tuple(sizes)


def buckets_for(resolution: int, divisor: int, *, most: float = 2.0) -> tuple[Size, ...]:
    """Return sizes with about resolution x resolution pixels, never more: first the square, then from nearly square to long.

    Args:
        divisor: the number that all sides are multiples of; sides have at least 64 pixels if the resolution does.
        most: the largest ratio of a long side to the short one.

    Raises:
        ValueError: the resolution or divisor is not a number from 1 up, the resolution is below the divisor, or `most` is
            below 1.
    """
    check_count("divisor", divisor)
    check_count("resolution", resolution, divisor)
    if not is_finite(most) or most < 1:
        raise ValueError(f"most={most!r}: expected a number from 1 up")
    square = resolution // divisor * divisor
    least = min(square, -(-_LEAST_SIDE // divisor) * divisor)
    sizes = {(square, square)}
    for short in range(least, square + 1, divisor):
        long = resolution**2 // short // divisor * divisor  # the longest side within the area
        if long <= most * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, key=lambda size: (max(size) / min(size), size)))


def nearest_bucket(size: tuple[int, int], buckets: Sequence[Size]) -> int:
    """Return the index of the bucket whose log(width / height) is nearest to the image's; among equals the first.

    Args:
        size: (width, height) of the image; buckets have the opposite order.
    """
    width, height = size

    def stretch(index: int) -> float:
        """Return the ratio whose logarithm is the difference; it is computed from whole numbers, so that ties are exact."""
        bucket_height, bucket_width = buckets[index]
        one, other = width * bucket_height, height * bucket_width
        return max(one, other) / min(one, other)

    return min(range(len(buckets)), key=stretch)


class Drawn(NamedTuple):
    """The position of the crop, as shares of the way from left to right and from top to bottom, and whether it is mirrored."""

    across: float = 0.5
    down: float = 0.5
    flipped: bool = False


@dataclass(frozen=True)
class BucketView:
    """How an image is viewed: resized so that it just covers `size`, then cropped to it, then possibly mirrored.

    Args:
        size: (height, width) in pixels.
        crop: "center", or "random" for another part in each epoch.
        flip: mirror half of the images in each epoch.

    Raises:
        ValueError: a side is below 1, or the crop is unknown.
    """

    size: Size
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    def __post_init__(self) -> None:
        for side in self.size:
            check_count("size", side)
        if self.crop not in ("center", "random"):
            raise ValueError(f"crop={self.crop!r}: the choices are 'center' and 'random'")

    @property
    def all(self) -> tuple[Drawn, ...]:
        """Every possible view of an image; none if they cannot be counted."""
        if self.crop == "random":
            return ()
        return (Drawn(), Drawn(flipped=True)) if self.flip else (Drawn(),)

    def drawn(self, seed: int, epoch: int, index: int) -> Drawn:
        """Return the view of an image in an epoch, which depends on nothing but the arguments."""
        draws = random.Random(stream_seed(seed, epoch, index, _VIEW))
        flipped, across, down = draws.random() < 0.5, draws.random(), draws.random()
        at = (across, down) if self.crop == "random" else (0.5, 0.5)
        return Drawn(*at, flipped=self.flip and flipped)

    def pixels(self, image: Image.Image, drawn: Drawn) -> Tensor:
        """Return the view's pixels, (3, height, width) uint8."""
        return self.part(image, self.whole(image.size), drawn)

    def place(self, image_size: tuple[int, int], drawn: Drawn) -> tuple[int, int]:
        """Return (top, left) of the crop in the resized image, for SDXL's `crop_coords_top_left`.

        If the view is mirrored, this is the place in the mirrored image, as in diffusers' script, which mirrors first.

        Args:
            image_size: (width, height) in pixels, before the image is resized.
        """
        whole = self.whole(image_size)
        left, top = self._corner(whole, drawn)
        return top, whole[0] - self.size[1] - left if drawn.flipped else left

    def whole(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Return (width, height) of the resized image: both sides at least as long as the view's, one of them exactly."""
        (width, height), (view_height, view_width) = image_size, self.size
        factor = max(view_width / width, view_height / height)
        return max(view_width, round(width * factor)), max(view_height, round(height * factor))

    def part(self, image: Image.Image, whole: tuple[int, int], drawn: Drawn) -> Tensor:
        """Return (3, height, width) uint8 of an image after resizing it to `whole`, (width, height), from any size."""
        image = image if image.size == whole else image.resize(whole, Image.Resampling.BICUBIC)
        left, top = self._corner(whole, drawn)
        part = image.crop((left, top, left + self.size[1], top + self.size[0]))
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn.flipped else part
        return torch.from_numpy(np.array(part.convert("RGB"))).permute(2, 0, 1).contiguous()

    def _corner(self, whole: tuple[int, int], drawn: Drawn) -> tuple[int, int]:
        """Return (left, top) of the crop before it is mirrored."""
        height, width = self.size
        return round(drawn.across * (whole[0] - width)), round(drawn.down * (whole[1] - height))
