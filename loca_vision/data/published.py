"""Image sets in their authors' file layout, one short function for each, on top of torchvision's own classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from loca_vision.data.images import TENTH, ImageArrays, ImageFiles, ImageSet

THIRD, QUARTER, FIFTH = Fraction(1, 3), Fraction(1, 4), Fraction(1, 5)
STANFORD_CARS_PARTS = (
    "cars_train",
    "cars_test",
    "devkit/cars_train_annos.mat",
    "devkit/cars_meta.mat",
    "cars_test_annos_withlabels.mat",
)
RESISC45_PARTS = ("train", "val", "test")
FASHION_MNIST_PARTS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


def oxford_pets(root: Path, download: bool = False) -> ImageSet:
    """37 breeds of cats and dogs: 3680 photographs and 3669 for testing, from `root/oxford-iiit-pet`."""
    parts = [datasets.OxfordIIITPet(str(root), split, download=download) for split in ("trainval", "test")]
    # Uses its files and labels, because the class opens images itself and does not say which one is broken.
    train, test = (ImageFiles(part._images, part._labels) for part in parts)
    return ImageSet(train, tuple(parts[0].classes), test)


def stanford_cars(root: Path, download: bool = False) -> ImageSet:
    """196 makes and models: 8144 photographs and 8041 for testing, from `root/stanford_cars`; it cannot be downloaded."""
    if importlib.util.find_spec("scipy") is None:
        raise ModuleNotFoundError("Stanford Cars needs scipy: python -m pip install scipy", name="scipy")
    parts = [datasets.StanfordCars(str(root), split) for split in ("train", "test")]
    train, test = (ImageFiles([file for file, _ in part._samples], [label for _, label in part._samples]) for part in parts)
    return ImageSet(train, tuple(parts[0].classes), test)


def cifar10(root: Path, download: bool = False) -> ImageSet:
    """10 classes: 50000 photographs of 32 x 32 pixels and 10000 for testing, from `root/cifar-10-batches-py`."""
    return _arrays([datasets.CIFAR10(str(root), train, download=download) for train in (True, False)])


def cifar100(root: Path, download: bool = False) -> ImageSet:
    """100 classes: 50000 photographs of 32 x 32 pixels and 10000 for testing, from `root/cifar-100-python`."""
    return _arrays([datasets.CIFAR100(str(root), train, download=download) for train in (True, False)])


def fashion_mnist(root: Path, download: bool = False) -> ImageSet:
    """10 kinds of clothing: 60000 images of 28 x 28 pixels and 10000 for testing, from `root/FashionMNIST/raw`."""
    return _arrays([datasets.FashionMNIST(str(root), train, download=download) for train in (True, False)])


def _arrays(parts: Sequence[Any]) -> ImageSet:
    train, test = (ImageArrays(np.asarray(part.data), np.asarray(part.targets).tolist()) for part in parts)
    return ImageSet(train, tuple(parts[0].classes), test)


def dtd(root: Path, download: bool = False) -> ImageSet:
    """47 textures: the 5640 images of `root/dtd` in the order of their names, a fifth of them for testing.

    The published partitions are not used, as in FourierFT's experiments.
    """
    parts = [datasets.DTD(str(root), split, download=download) for split in ("train", "val", "test")]
    for part in parts:
        if not len(part):
            raise ValueError(f"the list {part._split}1.txt is empty")
    files = sorted(Path(file) for part in parts for file in part._image_files)
    return _named(((file, file.parent.name) for file in files), FIFTH)


def eurosat(root: Path, download: bool = False) -> ImageSet:
    """10 kinds of land: 27000 satellite images of 64 x 64 pixels, from `root/eurosat/2750`, to be split 60 : 20 : 20."""
    eurosat_images = datasets.EuroSAT(str(root), download=download)
    files, labels = zip(*eurosat_images.samples, strict=True)
    return ImageSet(ImageFiles(files, labels), tuple(eurosat_images.classes), test_share=FIFTH, validation_share=QUARTER)


def fgvc_aircraft(root: Path, download: bool = False) -> ImageSet:
    """100 variants: 3334 photographs (`train`, without `val`) and 3333 for testing, from `root/fgvc-aircraft-2013b`."""
    parts = [datasets.FGVCAircraft(str(root), split, "variant", download=download) for split in ("train", "test")]
    train, test = (ImageFiles(part._image_files, part._labels) for part in parts)
    return ImageSet(train, tuple(parts[0].classes), test)


def resisc45(root: Path, download: bool = False) -> ImageSet:
    """45 kinds of scenes from above: 18900, 6300 and 6300 images of 256 x 256 pixels, from `root/NWPU-RESISC45`.

    The parts are the lists of file names `root/resisc45-{train,val,test}.txt`; it cannot be downloaded.
    """
    train, validation, test = (_listed(root, f"resisc45-{part}.txt") for part in RESISC45_PARTS)
    for name in sorted(set(validation.classes) ^ set(train.classes) | set(test.classes) ^ set(train.classes)):
        raise ValueError(f"the class {name!r} is not in all of the three lists")
    return ImageSet(train.train, train.classes, test.train, validation.train)


def _listed(root: Path, name: str) -> ImageSet:
    names = (root / name).read_text(encoding="utf-8").split()
    kinds = [line.rpartition("_")[0] for line in names]
    files = (root / "NWPU-RESISC45" / kind / line for kind, line in zip(kinds, names, strict=True))
    return _named(zip(files, kinds, strict=True))


def _named(files: Iterable[tuple[Path, str]], test_share: Fraction = TENTH) -> ImageSet:
    """Return files with the names of their classes as an image set; classes are indexed in the order of their names."""
    named = list(files)
    classes = sorted({name for _, name in named})
    number = {name: index for index, name in enumerate(classes)}
    images = ImageFiles([file for file, _ in named], [number[name] for _, name in named])
    return ImageSet(images, tuple(classes), test_share=test_share)


def digits(root: Path | None = None, download: bool = False) -> ImageSet:
    """10 handwritten digits: 1797 images of 8 x 8 pixels, from scikit-learn, a third of them for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    names = tuple(str(name) for name in bunch.target_names)
    return ImageSet(ImageArrays(pixels, bunch.target.tolist()), names, test_share=THIRD)
