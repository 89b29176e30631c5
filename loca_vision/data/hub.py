"""Copies of image sets on the Hugging Face hub, through the library `datasets`. No code from them is run."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from loca_vision.data.images import TENTH, Images, ImageSet, as_rgb

Split = tuple[str, str]


@dataclass(frozen=True)
class HubCopy:
    """Where a set's parts are: repository and split. If there is no test part, a share of `train` is to be held out."""

    train: Split
    test: Split | None = None
    validation: Split | None = None
    test_share: Fraction = TENTH

    @property
    def repositories(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part[0] for part in (self.train, self.validation, self.test) if part))


def _copy(repository: str, *, validation: bool = False) -> HubCopy:
    held = (repository, "validation") if validation else None
    return HubCopy((repository, "train"), (repository, "test"), held)


def _two(stem: str) -> HubCopy:
    return HubCopy((f"{stem}_train", "train"), (f"{stem}_test", "test"))


# FourierFT's own sources, except for DTD and CIFAR-10, whose copies here contain the same images.
HUB = {
    "oxford_pets": _copy("timm/oxford-iiit-pet"),
    "stanford_cars": _two("Multimodal-Fatima/StanfordCars"),
    "cifar10": _copy("uoft-cs/cifar10"),
    "dtd": HubCopy(("tanganke/dtd", "train+test"), test_share=Fraction(1, 5)),
    "eurosat": _copy("timm/eurosat-rgb", validation=True),
    "fgvc_aircraft": _two("Multimodal-Fatima/FGVC_Aircraft"),
    "resisc45": _copy("timm/resisc45", validation=True),
    "cifar100": _copy("uoft-cs/cifar100"),
    "fashion_mnist": _copy("zalando-datasets/fashion_mnist"),
}
IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")


class HubImages(Images):
    """Rows of a `datasets.Dataset` with an image and a class.

    Args:
        where: the repository and split, for error messages.

    Raises:
        ValueError: a column is missing; or, on access, an image is broken.
    """

    def __init__(self, rows: Any, where: str) -> None:
        self.where = where
        self.image, self.label = (self._column(rows, names) for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
        self.rows = rows.select_columns([self.image, self.label])
        kind = rows.features[self.label]
        names = getattr(kind, "names", None)
        values = names or sorted(set(rows[self.label]))
        self.classes = tuple(str(value) for value in values)
        # If the file has no names, the values themselves are the classes.
        numbers = None if names else {value: index for index, value in enumerate(values)}
        self.labels = [int(numbers[value] if numbers else value) for value in rows[self.label]]

    def _column(self, rows: Any, names: tuple[str, ...]) -> str:
        for name in names:
            if name in rows.column_names:
                return name
        raise ValueError(f"{self.where}: expected a column {' or '.join(names)}, got {', '.join(rows.column_names)}")

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        try:
            return as_rgb(self.rows[index][self.image]), self.labels[index]
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.where}, row {index}: it cannot be read as an image") from error
        except ValueError as error:
            raise ValueError(f"{self.where}, row {index}: {error}") from None

    def identity(self, index: int) -> bytes:
        """Return its place on the hub and its row."""
        return f"{self.where} {index}".encode()


def hub_copy(name: str, cache: Path | None = None) -> ImageSet:
    """Return the copy of a set that the table above names, downloading what is not in the cache.

    Raises:
        ModuleNotFoundError: the library `datasets` is not installed.
        ValueError: there is no copy of this set, or it is not as expected.
        OSError: it cannot be downloaded.
    """
    if name not in HUB:
        raise ValueError(f"source='hub': {name} has no copy on the hub; the sets that have are {', '.join(HUB)}")
    copy = HUB[name]
    train = _load(copy.train, cache)
    test, validation = (_load(part, cache) if part else None for part in (copy.test, copy.validation))
    for part in (test, validation):
        if part and part.classes != train.classes:
            raise ValueError(f"{part.where}: its classes are not those of {train.where}")
    return ImageSet(train, train.classes, test, validation, copy.test_share)


def _load(part: Split, cache: Path | None) -> HubImages:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "source='hub': the library datasets is missing: python -m pip install 'loca-vision[train]'", name=error.name
        ) from error
    repository, split = part
    try:
        rows = load_dataset(repository, split=split, cache_dir=str(cache) if cache else None)
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise OSError(f"https://huggingface.co/datasets/{repository}: {split} is not on the hub ({reason})") from error
    return HubImages(rows, f"{repository} ({split})")
