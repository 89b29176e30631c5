"""From an image to the model's input, with augmentation that is a function of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from loca_vision.data.images import Augment, Images
from loca_vision.data.sampling import stream_seed

Transform = Callable[[Image.Image], Tensor]


class Transformed(Dataset[tuple[Tensor, int]]):
    """Images as the model takes them: (3, h, w) float32 and class indices.

    With a seed, what the transform draws for image i in epoch e depends on (seed, e, i) only: not on the order of the
    images, the number of workers or where training was resumed. The global generators stay as they are.

    Args:
        transform: draws from torch's CPU generator, as torchvision's v2 transforms do.
        seed: None for a transform that draws nothing.
    """

    def __init__(self, images: Images, transform: Transform, seed: int | None = None) -> None:
        self.images, self.transform, self.seed, self.epoch = images, transform, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, before the DataLoader's iterator is made: its workers use a copy of this set."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        if self.seed is None:
            return self.transform(image), label
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed would reseed the accelerators' generators, which fork_rng does not restore here.
            torch.default_generator.manual_seed(stream_seed(self.seed, self.epoch, index))
            return self.transform(image), label


def evaluation_transform(
    size: int, mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic", *, crop_pct: float = 1.0
) -> Transform:
    """Short side to size / crop_pct pixels, centre crop, [0, 1], then (x - mean) / std: (3, size, size) float32.

    Args:
        crop_pct: the share of the resized image that the crop keeps, in (0, 1], as in timm's data configuration.

    Raises:
        ValueError: crop_pct is out of its range.
    """
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct={crop_pct}: expected a share of the image, above 0 and at most 1")
    resize = v2.Resize(int(size / crop_pct), interpolation=v2.InterpolationMode(interpolation), antialias=True)
    return _composed([resize, v2.CenterCrop(size)], mean, std)


def training_transform(
    size: int, mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic", *, augment: Augment = "crop"
) -> Transform:
    """A random view of an image, [0, 1], then (x - mean) / std: (3, size, size) float32.

    Args:
        augment: "crop": between 8 % and all of the image in a ratio from 3:4 to 4:3, flipped half the time;
            "flip": the centre, flipped half the time; "none": the centre, as in evaluation.

    Raises:
        ValueError: there is no such augmentation.
    """
    method = v2.InterpolationMode(interpolation)
    centre = [v2.Resize(size, interpolation=method, antialias=True), v2.CenterCrop(size)]
    steps = {
        "none": centre,
        "flip": [*centre, v2.RandomHorizontalFlip()],
        "crop": [v2.RandomResizedCrop(size, interpolation=method, antialias=True), v2.RandomHorizontalFlip()],
    }
    if augment not in steps:
        raise ValueError(f"augment={augment!r}: the choices are {', '.join(map(repr, steps))}")
    return _composed(steps[augment], mean, std)


def _composed(steps: list[Any], mean: Sequence[float], std: Sequence[float]) -> Transform:
    """Compose the steps, which work on the image's bytes, with the conversion to floating-point numbers after them."""
    last = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    transform: Transform = v2.Compose([*steps, *last])
    return transform
