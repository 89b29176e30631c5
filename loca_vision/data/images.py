"""Labelled images as they are, before any transform: arrays, files, parts of them, and how parts are held out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from loca_vision.data.image_headers import ORIENTATION, named, open_header, orientation_of

Augment = Literal["none", "flip", "crop"]
TENTH = Fraction(1, 10)


class Images(Dataset[tuple[Image.Image, int]]):
    """RGB images of any size with the index of their class, by position.

    Attributes:
        labels: the class index of each image, known without reading it.
    """

    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        raise NotImplementedError

    def identity(self, index: int) -> bytes:
        """Return bytes that identify an image without decoding it."""
        raise NotImplementedError


class ImageArrays(Images):
    """Images in memory: (n, h, w) or (n, h, w, 3) uint8, and n class indices."""

    def __init__(self, pixels: np.ndarray[Any, Any], labels: Sequence[int]) -> None:
        self.pixels, self.labels = pixels, labels

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]).convert("RGB"), int(self.labels[index])

    def identity(self, index: int) -> bytes:
        """Return its pixels."""
        return np.ascontiguousarray(self.pixels[index]).data.tobytes()


class ImageFiles(Images):
    """Images in files, opened on access.

    Args:
        folder: identities contain the files' paths relative to this folder, wherever it lies; None for file names alone.

    Raises:
        FileNotFoundError, ValueError: on access, an image does not exist or is broken; the error names the file.
    """

    def __init__(self, files: Sequence[str | Path], labels: Sequence[int], folder: Path | None = None) -> None:
        self.files, self.labels = [str(file) for file in files], [int(label) for label in labels]
        self.folder = folder

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return open_image(self.files[index]), self.labels[index]

    def identity(self, index: int) -> bytes:
        """Return the name of its file and the file's size in bytes."""
        file = Path(self.files[index])
        name = file.relative_to(self.folder).as_posix() if self.folder else file.name
        size = file.stat().st_size if file.is_file() else -1
        return os.fsencode(f"{name} {size}")


class Part(Images):
    """The images at some positions of another set."""

    def __init__(self, images: Images, positions: Sequence[int]) -> None:
        self.images, self.positions = images, positions
        self.labels = [images.labels[position] for position in positions]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[self.positions[index]]

    def identity(self, index: int) -> bytes:
        """Return the identity of the image in the other set."""
        return self.images.identity(self.positions[index])


class Relabelled(Images):
    """The same images with other class indices: `numbers[label]` instead of each label."""

    def __init__(self, images: Images, numbers: Sequence[int]) -> None:
        self.images, self.labels = images, [numbers[label] for label in images.labels]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index][0], self.labels[index]

    def identity(self, index: int) -> bytes:
        """Return the identity of the image itself."""
        return self.images.identity(index)


@dataclass(frozen=True)
class ImageSet:
    """A set of images as its authors published it, and what to hold out for the parts that it lacks.

    Args:
        train: the images to train on, or all images if there is no test part.
        classes: the names of the classes, by index.
        test_share: the share of `train` that is held out for testing if there is no test part.
        validation_share: the share of the rest of `train` that is held out if there is no validation part.
        notes: sentences about how the files were understood.
    """

    train: Images
    classes: tuple[str, ...]
    test: Images | None = None
    validation: Images | None = None
    test_share: Fraction = TENTH
    validation_share: Fraction = TENTH
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageSplits:
    """Images to train on, to choose the epoch with and to test on, untransformed: RGB of any size, with class indices.

    Args:
        classes: the names of the classes, by index.
        licence: what their authors say about using them.
        augment: the augmentation that suits them.
        protocol: where the parts come from and how large they are, for a record in JSON.
        notes: sentences about how the files were understood.
    """

    train: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    licence: str
    augment: Augment
    protocol: dict[str, Any]
    notes: tuple[str, ...] = ()


def open_image(path: str | Path, content: BinaryIO | None = None) -> Image.Image:
    """Open an image as RGB and upright: turned as its EXIF orientation says.

    Args:
        path: the path of its file or, if `content` has the file's contents, a name for error messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as an image.
    """
    with named(path), open_header(path if content is None else content) as image:
        return as_rgb(upright(image))


def upright(image: Image.Image) -> Image.Image:
    """Return the image as the camera was held: turned and mirrored as its EXIF orientation says.

    If the EXIF block is broken and does not tell, the image stays as it is; its pixels are checked all the same.
    """
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of any kind, because arbitrary bytes are parsed, and then written again
        orientation = orientation_of(image)
    if orientation is None:
        return image
    plain, image = Image.Exif(), image.copy()
    plain[ORIENTATION] = orientation
    image.info["exif"] = plain.tobytes()
    return ImageOps.exif_transpose(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """Return the image with 8 bits for each of red, green and blue, as diffusers' `load_image` shows it.

    Transparent areas show the colour underneath. 16-bit grey keeps its upper 8 bits, where PIL would clip everything brighter
    than 255.

    Raises:
        ValueError: the image is 32-bit grey, whose value for white is unknown.
    """
    if image.mode in ("I", "F"):
        raise ValueError(f"expected 8 or 16 bits a channel, got pixels of PIL's mode {image.mode!r}")
    if image.mode.startswith("I;16"):
        grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        grey.info.update(image.info)  # for example how the camera was turned
        image = grey
    if isinstance(image.info.get("transparency"), bytes):  # of a palette; PIL would warn
        image = image.convert("RGBA")
    return image.convert("RGB")


def as_png(image: Image.Image) -> bytes:
    """Return the bytes of a PNG file."""
    data = BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def hold_out(size: int, share: Fraction, seed: int) -> tuple[list[int], list[int]]:
    """Return which positions from 0 to size - 1 are kept and which held out, drawn on the CPU from the arguments alone.

    The share is rounded up, as `train_test_split` of scikit-learn and datasets does: 8144 images give 7329 and 815.

    Raises:
        ValueError: nothing would be left.
    """
    held = -(-size * share.numerator // share.denominator)
    if held >= size:
        raise ValueError(f"{size} images are too few to hold out {share} of them")
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[held:], order[:held]


def first(images: Images, count: int, seed: int) -> Images:
    """Return `count` of the images, drawn by the seed, or all of them if there are no more."""
    if count >= len(images):
        return images
    return Part(images, torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:count].tolist())
