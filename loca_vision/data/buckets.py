"""Images of several shapes: the sizes that they are brought to, which of them suits an image, and how it is looked at there."""

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
    """The sizes in a text such as "1024,1024;768,1280", each height,width.

    Args:
        divisor: of all sides, as the model needs it.

    Raises:
        ValueError: it is not a list of sizes, a side is not a multiple of `divisor`, or a size comes twice.
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
    """Sizes of about resolution x resolution pixels, none of more: first the square, then others, from nearly square to long.

    Args:
        divisor: of all sides, which are 64 pixels or more where the resolution is.
        most: times that a long side may have the short one.

    Raises:
        ValueError: a resolution or divisor that is not a number from 1 up, a resolution below the divisor, or `most` below 1.
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
    """The index of the bucket whose logarithm of width / height is nearest to that of an image; of equal ones the first.

    Args:
        size: (width, height) of the image, unlike the buckets.
    """
    width, height = size

    def stretch(index: int) -> float:
        """The logarithms differ by that of this ratio, which is computed of whole numbers, so that equal ones are equal."""
        bucket_height, bucket_width = buckets[index]
        one, other = width * bucket_height, height * bucket_width
        return max(one, other) / min(one, other)

    return min(range(len(buckets)), key=stretch)


class Drawn(NamedTuple):
    """Where the crop lies, as shares of the way from left to right and top to bottom, and whether it is mirrored."""

    across: float = 0.5
    down: float = 0.5
    flipped: bool = False


@dataclass(frozen=True)
class BucketView:
    """How an image is looked at: resized so that it just covers `size`, then cropped to it, then mirrored or not.

    Args:
        size: (height, width) in pixels.
        crop: "center", or "random", another part in each epoch.
        flip: mirror half of the images in each epoch.

    Raises:
        ValueError: a side below 1, or another crop.
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
        """Every view that there is of an image; none where they cannot be counted."""
        if self.crop == "random":
            return ()
        return (Drawn(), Drawn(flipped=True)) if self.flip else (Drawn(),)

    def drawn(self, seed: int, epoch: int, index: int) -> Drawn:
        """The view of an image in an epoch: a function of the arguments alone."""
        draws = random.Random(stream_seed(seed, epoch, index, _VIEW))
        flipped, across, down = draws.random() < 0.5, draws.random(), draws.random()
        at = (across, down) if self.crop == "random" else (0.5, 0.5)
        return Drawn(*at, flipped=self.flip and flipped)

    def pixels(self, image: Image.Image, drawn: Drawn) -> Tensor:
        """(3, height, width) uint8."""
        return self.part(image, self.whole(image.size), drawn)

    def place(self, image_size: tuple[int, int], drawn: Drawn) -> tuple[int, int]:
        """(top, left) of the crop in the resized image, for SDXL's `crop_coords_top_left`.

        Where the view is mirrored, it is the place in the mirrored image, as in diffusers' script, which mirrors first.

        Args:
            image_size: (width, height) in pixels, before the image is resized.
        """
        whole = self.whole(image_size)
        left, top = self._corner(whole, drawn)
        return top, whole[0] - self.size[1] - left if drawn.flipped else left

    def whole(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the resized image: both sides as long as those of the view or longer, one of them exactly."""
        (width, height), (view_height, view_width) = image_size, self.size
        factor = max(view_width / width, view_height / height)
        return max(view_width, round(width * factor)), max(view_height, round(height * factor))

    def part(self, image: Image.Image, whole: tuple[int, int], drawn: Drawn) -> Tensor:
        """(3, height, width) uint8 of an image that is resized to `whole`, (width, height), whatever its own size is."""
        image = image if image.size == whole else image.resize(whole, Image.Resampling.BICUBIC)
        left, top = self._corner(whole, drawn)
        part = image.crop((left, top, left + self.size[1], top + self.size[0]))
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if drawn.flipped else part
        return torch.from_numpy(np.array(part.convert("RGB"))).permute(2, 0, 1).contiguous()

    def _corner(self, whole: tuple[int, int], drawn: Drawn) -> tuple[int, int]:
        """(left, top) of the crop before it is mirrored."""
        height, width = self.size
        return round(drawn.across * (whole[0] - width)), round(drawn.down * (whole[1] - height))
