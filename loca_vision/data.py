"""Labelled images: digits inside scikit-learn, Fashion-MNIST, or the user's own folder. Stands alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2

Transform = Callable[[Image.Image], Tensor]


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images held in memory with their classes: arrays (n, h, w) uint8 and n class indices."""

    def __init__(self, images: np.ndarray[Any, Any], labels: Sequence[int], transform: Transform) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index]).convert("RGB")), int(self.labels[index])


@dataclass(frozen=True)
class ImageSet:
    """A training and a test part, and the names of the classes."""

    train: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    classes: tuple[str, ...]


def open_image(path: str | Path) -> Image.Image:
    """The image as RGB.

    Raises:
        ValueError: it cannot be read as one.
    """
    try:
        with Image.open(path) as image:
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except UnidentifiedImageError:
        raise ValueError(f"{path}: it cannot be read as an image") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: it cannot be read as an image ({error})") from error


def transform_for(size: int, mean: Sequence[float], std: Sequence[float], interpolation: str = "bicubic") -> Transform:
    """Short side to `size` pixels, centre crop, [0, 1], then (x - mean) / std: (3, size, size) float32."""
    steps = [
        v2.Resize(size, interpolation=v2.InterpolationMode(interpolation), antialias=True),
        v2.CenterCrop(size),
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(list(mean), list(std)),
    ]
    transform: Transform = v2.Compose(steps)
    return transform


def digits(transform: Transform, *, test_share: float = 1 / 3, seed: int = 0) -> ImageSet:
    """1797 handwritten digits of 8 x 8 pixels, from scikit-learn, split at random by the seed."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = (found.images * (255 / 16)).round().astype(np.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).numpy()
    held = round(test_share * len(images))
    parts = [LabelledImages(images[part], found.target[part].tolist(), transform) for part in (order[held:], order[:held])]
    return ImageSet(parts[0], parts[1], tuple(str(name) for name in found.target_names))


def fashion_mnist(root: Path, transform: Transform) -> ImageSet:
    """60000 and 10000 articles of clothing of 28 x 28 pixels, from `root/FashionMNIST/raw`, as torchvision lays it out.

    Raises:
        FileNotFoundError: the files are missing; the sentence says where they can be had.
    """
    try:
        parts = [datasets.FashionMNIST(str(root), train=train) for train in (True, False)]
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{root / 'FashionMNIST' / 'raw'}: Fashion-MNIST is not there; torchvision.datasets.FashionMNIST(root, "
            "download=True) puts it there, or unpack the files of Debian's package dataset-fashion-mnist into that folder"
        ) from error
    train, test = (LabelledImages(part.data.numpy(), part.targets.tolist(), transform) for part in parts)
    return ImageSet(train, test, tuple(parts[0].classes))


def folder(root: Path, transform: Transform) -> ImageSet:
    """`root/train/<class>/*` and `root/test/<class>/*`, any nesting below, in the order of their names.

    Raises:
        FileNotFoundError: a folder is missing, or a class has no image.
        ValueError: fewer than two classes, or different classes in the two parts.
    """
    for part in (root, root / "train", root / "test"):
        if not part.is_dir():
            raise FileNotFoundError(
                f"{part}: there is no such folder; train/ and test/ with a folder for each class are wanted"
            )
    train, test = (datasets.ImageFolder(str(root / part), transform, loader=open_image) for part in ("train", "test"))
    for name in sorted(set(train.classes) ^ set(test.classes)):
        raise ValueError(f"{root}: the class {name!r} is in only one of train/ and test/")
    if len(train.classes) < 2:
        raise ValueError(f"{root / 'train'}: it has one class (folder), {train.classes[0]!r}; a classifier needs 2")
    return ImageSet(train, test, tuple(train.classes))


def first(data: Dataset[tuple[Tensor, int]], count: int, seed: int) -> Dataset[tuple[Tensor, int]]:
    """`count` of the images at random by the seed, or all of them where there are no more."""
    total = len(data)  # type: ignore[arg-type]
    if count >= total:
        return data
    return Subset(data, torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist())
