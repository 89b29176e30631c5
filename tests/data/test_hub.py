"""Copies of the image sets on the hub: parquet files, read by the library `datasets`."""

import io
import json
import re
import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageColumn
from PIL import Image

from loca_vision.data.hub import HUB, HubCopy
from loca_vision.data.load import NAMES, load
from support.image_folders import COLOURS, mixed, picture

CLASSES = ["ant", "bee", "cat"]
ON_HUB = [name for name in NAMES if name not in ("digits", "folder")]


def encoded(label, number, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(picture(label, number)).save(file, kind)
    return {"bytes": file.getvalue(), "path": f"{number}.{kind.lower()}"}


def rows(count, *, image="image", label="label", kind=None, first=0):
    """A Dataset of `count` images a class, in JPEG, beside a column that nobody asked for."""
    labels = mixed(count)
    kind = kind or ClassLabel(names=CLASSES)
    values = labels if isinstance(kind, ClassLabel) else [CLASSES[i] if kind.dtype == "string" else 10 * i for i in labels]
    images = [encoded(label, first + i, "JPEG") for i, label in enumerate(labels)]
    features = Features({image: ImageColumn(), label: kind, "coarse_label": Value("int64")})
    return Dataset.from_dict({image: images, label: values, "coarse_label": [0] * len(labels)}, features=features)


@pytest.fixture
def hub(monkeypatch):
    """A hub of data sets by (repository, split); it notes how it was asked."""
    kept, asked = {}, []

    def load_dataset(repository, **options):
        asked.append((repository, options))
        return kept[repository, options["split"]]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return kept, asked


def fill(kept, name, **columns):
    copy = HUB[name]
    for number, part in enumerate(part for part in (copy.train, copy.test, copy.validation) if part):
        kept[part] = rows(10 - 2 * number, first=1000 * number, **columns)


def check(images):
    for image, label in (images[i] for i in range(len(images))):
        assert image.mode == "RGB" and type(label) is int
        assert label == np.abs(np.asarray(image, float).mean((0, 1)) - COLOURS).sum(1).argmin()


@pytest.mark.parametrize("name", ON_HUB)
def test_every_copy(name, hub, tmp_path):
    fill(hub[0], name)
    splits = load(name, tmp_path, source="hub", seed=3)
    published = {"eurosat": (30, 18, 24), "resisc45": (30, 18, 24), "dtd": (21, 3, 6)}
    assert (len(splits.train), len(splits.validation), len(splits.test)) == published.get(name, (27, 3, 24))
    assert splits.classes == (*CLASSES,)
    for images in (splits.train, splits.validation, splits.test):
        check(images)
    assert json.loads(json.dumps(splits.protocol)) == splits.protocol
    assert (splits.protocol["source"], splits.protocol["repositories"]) == ("hub", list(HUB[name].repositories))
    for repository, options in hub[1]:
        assert repository in HUB[name].repositories
        assert set(options) == {"split", "cache_dir"}  # and so never trust_remote_code
        assert options["cache_dir"] == str(tmp_path)


@pytest.mark.parametrize(
    "columns",
    [
        {"image": "img", "label": "fine_label"},
        {"label": "labels"},
        {"kind": Value("int64")},
        {"kind": Value("string")},
    ],
    ids=str,
)
def test_columns(columns, hub):
    fill(hub[0], "cifar100", **columns)
    splits = load("cifar100", None, source="hub")
    check(splits.train)
    numbered = "kind" in columns and columns["kind"].dtype == "int64"
    assert splits.classes == (("0", "10", "20") if numbered else (*CLASSES,))
    assert hub[1][0][1]["cache_dir"] is None


def test_files_on_disk_through_the_library_itself(tmp_path, monkeypatch):
    """Parquet, as on the hub, with the splits in the names of the files."""
    for part, count in (("train", 10), ("test", 4)):
        (tmp_path / "copy" / "data").mkdir(parents=True, exist_ok=True)
        rows(count).to_parquet(tmp_path / "copy" / "data" / f"{part}-00000-of-00001.parquet")
    repository = str(tmp_path / "copy")
    monkeypatch.setitem(HUB, "cifar10", HubCopy((repository, "train"), (repository, "test")))
    splits = load("cifar10", tmp_path / "cache", source="hub")
    assert (len(splits.train), len(splits.validation), len(splits.test), splits.classes) == (27, 3, 12, (*CLASSES,))
    check(splits.train)
    monkeypatch.setitem(HUB, "dtd", HubCopy((repository, "train+test")))
    assert len(load("dtd", tmp_path / "cache", source="hub").test) == 5


def test_the_parts_are_a_function_of_the_seed(hub):
    fill(hub[0], "oxford_pets")
    one, same, other = (load("oxford_pets", None, source="hub", seed=seed).train for seed in (1, 1, 2))
    labels = [[images[i][0].tobytes() for i in range(27)] for images in (one, same, other)]
    assert labels[0] == labels[1] != labels[2]


def test_a_broken_image(hub):
    fill(hub[0], "oxford_pets")
    broken = rows(1).cast_column("image", ImageColumn(decode=False)).to_dict()
    broken["image"][1]["bytes"] = b"no picture"
    hub[0]["timm/oxford-iiit-pet", "test"] = Dataset.from_dict(broken, features=rows(1).features)
    test = load("oxford_pets", None, source="hub").test
    assert test[0][1] == 0
    with pytest.raises(ValueError, match=re.escape("timm/oxford-iiit-pet (test), row 1: it cannot be read as an image")):
        test[1]


FAULTS = {
    "column": (
        {"label": "species"},
        "timm/oxford-iiit-pet (train): expected a column label or labels or fine_label, got image",
    ),
    "classes": ({}, "timm/oxford-iiit-pet (test): its classes are not those of timm/oxford-iiit-pet (train)"),
}


@pytest.mark.parametrize(("columns", "sentence"), FAULTS.values(), ids=FAULTS)
def test_copies_that_are_not_as_expected(columns, sentence, hub):
    fill(hub[0], "oxford_pets", **columns)
    hub[0]["timm/oxford-iiit-pet", "test"] = rows(2, kind=ClassLabel(names=["ant", "bee", "cow"]))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load("oxford_pets", None, source="hub")


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_sets_without_a_copy(name):
    with pytest.raises(ValueError, match=f"source='hub': {name} has no copy on the hub; the sets that have are oxford_pets"):
        load(name, None, source="hub")


def test_without_a_network(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach\nthe hub")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    sentence = "https://huggingface.co/datasets/timm/resisc45: train is not on the hub (Couldn't reach the hub)"
    with pytest.raises(OSError, match=re.escape(sentence)):
        load("resisc45", None, source="hub")


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=re.escape("python -m pip install 'loca-vision[train]'")) as raised:
        load("resisc45", None, source="hub")
    assert raised.value.name == "datasets"
