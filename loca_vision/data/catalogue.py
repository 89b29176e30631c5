"""The catalogue of image sets: reader, licence, files, and where to get them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchvision import datasets

from loca_vision.data import published
from loca_vision.data.folder import folder
from loca_vision.data.images import Augment, ImageSet


@dataclass(frozen=True)
class Entry:
    """One image set.

    Args:
        title: its name in running text.
        read: reads it from the files under a root; with True, it downloads them there first.
        licence: what its authors say about using it.
        needs: files and folders that must be under the root.
        get: how to get them, with {root} as a placeholder.
        downloads: whether `read` can download.
        augment: the trainer's default augmentation: random crops, only flips, or nothing.
        in_memory: whether all images are read at once, so that loading needs no worker processes.
    """

    title: str
    read: Callable[[Path, bool], ImageSet]
    licence: str
    needs: tuple[str, ...] = ()
    get: str = ""
    downloads: bool = False
    augment: Augment = "crop"
    in_memory: bool = False


def _fetched(kind: str, address: str) -> str:
    """Return a shell command that downloads the set; torchvision knows where the files are."""
    command = f"from torchvision.datasets import {kind}; {kind}('{{root}}', download=True)"
    return f'python -c "{command}" fetches it from {address}'


def _under(folder: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in names)


def _cifar(kind: Any) -> tuple[str, ...]:
    return _under(kind.base_folder, *(name for name, _ in (*kind.train_list, *kind.test_list)), kind.meta["filename"])


_HUB = ", or --source hub reads a copy"
_CIFAR = "https://www.cs.toronto.edu/~kriz/cifar.html"
_OXFORD = "https://www.robots.ox.ac.uk/~vgg/data"
_RESISC45 = "https://huggingface.co/datasets/isaaccorley/resisc45/resolve/main"

SETS = {
    "oxford_pets": Entry(
        "Oxford-IIIT Pets",
        published.oxford_pets,
        "CC BY-SA 4.0",
        _under("oxford-iiit-pet", "images", "annotations/trainval.txt", "annotations/test.txt"),
        _fetched("OxfordIIITPet", f"{_OXFORD}/pets") + _HUB,
        downloads=True,
    ),
    "stanford_cars": Entry(
        "Stanford Cars",
        published.stanford_cars,
        "unclear; for research",
        _under("stanford_cars", *published.STANFORD_CARS_PARTS),
        "torchvision cannot download it any more: https://github.com/pytorch/vision/issues/7545 tells where to find the "
        "folders cars_train, cars_test and devkit (with cars_train_annos.mat and cars_meta.mat) and the file "
        "cars_test_annos_withlabels.mat, which go into {root}/stanford_cars" + _HUB,
    ),
    "cifar10": Entry(
        "CIFAR-10",
        published.cifar10,
        "none stated",
        _cifar(datasets.CIFAR10),
        _fetched("CIFAR10", _CIFAR) + _HUB,
        downloads=True,
        in_memory=True,
    ),
    "dtd": Entry(
        "DTD",
        published.dtd,
        "for research",
        _under("dtd/dtd", "images", "labels/train1.txt", "labels/val1.txt", "labels/test1.txt"),
        _fetched("DTD", f"{_OXFORD}/dtd") + _HUB,
        downloads=True,
    ),
    "eurosat": Entry(
        "EuroSAT",
        published.eurosat,
        "MIT",
        ("eurosat/2750",),
        _fetched("EuroSAT", "https://huggingface.co/datasets/torchgeo/eurosat") + _HUB,
        downloads=True,
    ),
    "fgvc_aircraft": Entry(
        "FGVC-Aircraft",
        published.fgvc_aircraft,
        "for non-commercial research only",
        _under("fgvc-aircraft-2013b/data", "images", "variants.txt", "images_variant_train.txt", "images_variant_test.txt"),
        _fetched("FGVCAircraft", f"{_OXFORD}/fgvc-aircraft") + _HUB,
        downloads=True,
    ),
    "resisc45": Entry(
        "RESISC45",
        published.resisc45,
        "unclear; for research",
        ("NWPU-RESISC45", *(f"resisc45-{part}.txt" for part in published.RESISC45_PARTS)),
        f"{_RESISC45}/NWPU-RESISC45.zip is to be unpacked in {{root}}, and the three lists {_RESISC45}/resisc45-train.txt, "
        "resisc45-val.txt and resisc45-test.txt go next to it" + _HUB,
    ),
    "cifar100": Entry(
        "CIFAR-100",
        published.cifar100,
        "none stated",
        _cifar(datasets.CIFAR100),
        _fetched("CIFAR100", _CIFAR) + _HUB,
        downloads=True,
        in_memory=True,
    ),
    "fashion_mnist": Entry(
        "Fashion-MNIST",
        published.fashion_mnist,
        "MIT",
        _under("FashionMNIST/raw", *(f"{part}-ubyte" for part in published.FASHION_MNIST_PARTS)),
        _fetched("FashionMNIST", "https://github.com/zalandoresearch/fashion-mnist")
        + ", or unpack the files of Debian's package dataset-fashion-mnist into {root}/FashionMNIST/raw",
        downloads=True,
        augment="none",
        in_memory=True,
    ),
    "digits": Entry("The digits", published.digits, "CC BY 4.0", augment="none", in_memory=True),
    "folder": Entry("The folder", folder, "the user's own"),
}
