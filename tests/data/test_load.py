"""Tiny copies of every set's published layout: what is read is what was written, split as the protocol says."""

import json
import re
import shutil
import urllib.error
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from torchvision.datasets import cifar

from loca_vision.data.catalogue import SETS
from loca_vision.data.images import first, hold_out, open_image
from loca_vision.data.load import NAMES, load
from support.image_folders import COLOURS, WRITERS, accept_any_md5, save, write_cifar10, write_folder

IN_IMAGE_FILES = [name for name in NAMES if name not in ("digits", "cifar10", "cifar100", "fashion_mnist")]
SIZES = {"dtd": (60, 7, 17), "eurosat": (42, 15, 15), "resisc45": (36, 12, 12), "digits": (1078, 120, 599)}


@pytest.fixture(autouse=True)
def other_images_than_the_published(monkeypatch):
    accept_any_md5(monkeypatch)


def everything(images):
    return [images[i] for i in range(len(images))]


def keys(images):
    """Each image's pixels and label, by which it is told from the others."""
    return [(image.tobytes(), label) for image, label in everything(images)]


def parts(splits):
    return {"train": splits.train, "validation": splits.validation, "test": splits.test}


def test_the_names():
    published = ("oxford_pets", "stanford_cars", "cifar10", "dtd", "eurosat", "fgvc_aircraft", "resisc45", "cifar100")
    assert (*published, "fashion_mnist", "digits", "folder") == NAMES
    assert set(NAMES) == set(WRITERS)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_what_was_written(name, tmp_path):
    written = WRITERS[name](tmp_path)
    splits = load(name, tmp_path)
    assert splits.classes == written.classes
    assert tuple(map(len, parts(splits).values())) == SIZES.get(name, (32, 4, 12))
    found = [label for images in parts(splits).values() for _, label in everything(images)]
    if written.parts:
        assert Counter(found) == Counter(label for labels in written.parts.values() for label in labels)
    if splits.protocol["test"] == "published":
        assert [label for _, label in everything(splits.test)] == written.parts["test"]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("digits", "fashion_mnist")])
def test_an_image_comes_with_its_own_label(name, tmp_path):
    WRITERS[name](tmp_path)
    for images in parts(load(name, tmp_path)).values():
        for image, label in everything(images):
            assert image.mode == "RGB" and type(label) is int
            assert label == np.abs(np.asarray(image, float).mean((0, 1)) - COLOURS).sum(1).argmin()


def test_grey_images_come_with_their_labels(tmp_path):
    WRITERS["fashion_mnist"](tmp_path)
    for image, label in everything(load("fashion_mnist", tmp_path).train):
        assert (image.mode, image.size, type(label)) == ("RGB", (28, 28), int)
        assert label == np.abs(np.asarray(image).mean() - [30, 120, 220]).argmin()


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_are_a_function_of_the_seed_and_share_no_image(name, tmp_path):
    WRITERS[name](tmp_path)
    one, same, other = (load(name, tmp_path, seed=seed) for seed in (1, 1, 2))
    for part in parts(one):
        assert keys(parts(one)[part]) == keys(parts(same)[part])
        published = one.protocol.get(part) == "published" or one.protocol["validation"] == "published"
        assert (keys(parts(one)[part]) == keys(parts(other)[part])) == published
    if name == "digits":  # among which some may be equal
        return
    images = [key for part in parts(one).values() for key in keys(part)]
    assert len(set(images)) == len(images)
    assert set(images) == {key for part in parts(other).values() for key in keys(part)}


@pytest.mark.parametrize("name", NAMES)
def test_the_protocol_is_a_record(name, tmp_path):
    WRITERS[name](tmp_path)
    splits = load(name, tmp_path, seed=7)
    record = json.loads(json.dumps(splits.protocol))
    assert record == splits.protocol
    assert (record["dataset"], record["source"], record["seed"]) == (name, "torchvision", 7)
    assert record["sizes"] == {part: len(images) for part, images in parts(splits).items()}
    assert record["augment"] == splits.augment == ("none" if name in ("digits", "fashion_mnist") else "crop")
    assert splits.licence


def test_the_shares_are_recorded(tmp_path):
    WRITERS["dtd"](tmp_path)
    record = load("dtd", tmp_path).protocol
    assert (record["test"], record["validation"]) == ("1/5 of 84, drawn by the seed", "1/10 of 67, drawn by the seed")


@pytest.mark.parametrize(
    ("size", "share", "held"),
    [
        *[(3680, "1/10", 368), (8144, "1/10", 815), (50000, "1/10", 5000), (5640, "1/5", 1128), (4512, "1/10", 452)],
        *[(27000, "1/5", 5400), (21600, "1/4", 5400), (3334, "1/10", 334), (1797, "1/3", 599), (2, "1/10", 1)],
    ],
)
def test_the_published_sizes(size, share, held):
    """Those of FourierFT's experiments; a share is exact and rounded up."""
    kept, out = hold_out(size, Fraction(share), 3)
    assert (len(kept), len(out)) == (size - held, held)
    assert sorted(kept + out) == list(range(size))
    assert hold_out(size, Fraction(share), 3) == (kept, out)


MISSING = [
    pytest.param(name, path, download, id=f"{name} {path} {'download' if download else ''}")
    for name, entry in SETS.items()
    for path in entry.needs
    for download in (False, True)
    if not (download and entry.downloads)  # or torchvision would fetch it
]


@pytest.mark.parametrize(("name", "missing", "download"), MISSING)
def test_missing_files(name, missing, download, tmp_path):
    WRITERS[name](tmp_path)
    path = tmp_path / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError) as raised:
        load(name, tmp_path, download=download)
    said = str(raised.value)
    assert said.startswith(f"{path}: {SETS[name].title} is not there; ")
    assert "https://" in said and str(tmp_path) in said.partition("; ")[2]
    assert "--source hub" in said or name == "fashion_mnist"
    assert "\n" not in said and "{" not in said


def test_the_command_in_the_sentence_is_one(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        load("cifar10", tmp_path)
    command = re.search(r'python -c "(.*?)"', str(raised.value)).group(1)
    assert command == f"from torchvision.datasets import CIFAR10; CIFAR10('{tmp_path}', download=True)"
    compile(command, "", "exec")


@pytest.mark.parametrize("name", IN_IMAGE_FILES)
@pytest.mark.parametrize("fault", ["bytes", "truncated", "gone"])
def test_broken_images(name, fault, tmp_path):
    WRITERS[name](tmp_path)
    splits = load(name, tmp_path)
    path = sorted([*tmp_path.rglob("*.jpg"), *tmp_path.rglob("*.png")])[0]
    whole = path.read_bytes()
    path.unlink()
    if fault != "gone":
        path.write_bytes(b"no picture" if fault == "bytes" else whole[: len(whole) // 2])
    rule = "there is no such image" if fault == "gone" else "it cannot be read as an image"
    with pytest.raises(FileNotFoundError if fault == "gone" else ValueError, match=re.escape(f"{path}: {rule}")):
        [keys(images) for images in parts(splits).values()]


NOT_AS_PUBLISHED = {
    "oxford_pets": "oxford-iiit-pet/annotations/test.txt",
    "stanford_cars": "stanford_cars/devkit/cars_meta.mat",
    "cifar10": "cifar-10-batches-py/data_batch_2",
    "dtd": "dtd/dtd/labels/val1.txt",
    "fgvc_aircraft": "fgvc-aircraft-2013b/data/images_variant_train.txt",
    "resisc45": "resisc45-val.txt",
    "cifar100": "cifar-100-python/meta",
    "fashion_mnist": "FashionMNIST/raw/t10k-labels-idx1-ubyte",
}


@pytest.mark.parametrize(("name", "path"), NOT_AS_PUBLISHED.items())
@pytest.mark.parametrize("content", [b"", b"neither/one nor/the other/\n", b"\xff\xfe\x00"])
def test_files_that_are_not_as_published(name, path, content, tmp_path):
    WRITERS[name](tmp_path)
    (tmp_path / path).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        load(name, tmp_path)
    assert str(raised.value).startswith(f"{tmp_path}: the files of {SETS[name].title} are not as published (")
    assert "\n" not in str(raised.value)


def test_cifar_is_checked_against_the_published_hashes(tmp_path, monkeypatch):
    """Which is what makes it safe to unpickle."""
    monkeypatch.undo()
    write_cifar10(tmp_path)
    with pytest.raises(ValueError, match=r"CIFAR-10 are not as published .*corrupted"):
        load("cifar10", tmp_path)


def test_downloading(tmp_path, monkeypatch):
    """By torchvision, into the root."""
    monkeypatch.setattr(cifar, "download_and_extract_archive", lambda url, root, **_: write_cifar10(tmp_path))
    assert len(load("cifar10", tmp_path, download=True).test) == 12


def test_a_download_that_fails(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(cifar, "download_and_extract_archive", fail)
    with pytest.raises(OSError, match=r"CIFAR-10 cannot be downloaded \(<urlopen error no route to host>\)"):
        load("cifar10", tmp_path, download=True)


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_folder_with_its_own_validation_part(name, tmp_path):
    write_folder(tmp_path, validation=2)
    (tmp_path / "val").rename(tmp_path / name)
    splits = load("folder", tmp_path)
    assert tuple(map(len, parts(splits).values())) == (36, 6, 12)
    assert splits.protocol["validation"] == "published"


def test_a_folder_of_classes_alone(tmp_path):
    write_folder(tmp_path, flat=20)
    splits = load("folder", tmp_path)
    assert splits.classes == ("blue", "green", "red")
    assert tuple(map(len, parts(splits).values())) == (48, 6, 6)
    assert splits.protocol["test"] == "1/10 of 60, drawn by the seed"


def test_a_few_images_are_enough(tmp_path):
    write_folder(tmp_path, train=1, test=1)
    assert tuple(map(len, parts(load("folder", tmp_path)).values())) == (2, 1, 3)


def test_the_files_are_split_whatever_folder_they_are_in(tmp_path):
    """By seed and size alone: a copy elsewhere has the same parts."""
    for place in ("here", "there"):
        WRITERS["eurosat"](tmp_path / place)
    one, other = (load("eurosat", tmp_path / place) for place in ("here", "there"))
    assert [keys(images) for images in parts(one).values()] == [keys(images) for images in parts(other).values()]


def test_images_are_found_at_any_depth(tmp_path):
    write_folder(tmp_path)
    save(tmp_path / "train" / "red" / "deep" / "er" / "1.JPG", 2, 5000)
    assert load("folder", tmp_path).protocol["validation"].startswith("1/10 of 37")


FOLDERS = {
    "nothing": ((), "{}: it has no folder; expected train/ and test/"),
    "no train": (("test/a/1.png", "test/b/1.png"), "{}: expected a folder train/ next to test/, got none"),
    "one class": (("a/1.png",), "{}: it has one class (folder), 'a'; a classifier needs 2"),
    "no image": (("a/1.png", "b/1.txt"), "{}: found no image for the classes b; remove these folders"),
    "no class": (("train/1.png", "test/1.png"), "{}/train: it has no folder"),
    "too few": (("a/1.png", "b/1.png"), "1 images are too few to hold out 1/9 of them"),
    "other classes": (
        ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"),
        "{}: the class 'b' is in only one of train/ and test/",
    ),
    "other classes to validate": (
        ("train/a/1.png", "train/b/1.png", "test/a/1.png", "test/b/1.png", "val/a/1.png", "val/z/1.png"),
        "{}: the class 'b' is in only one of train/ and val/",
    ),
}


@pytest.mark.parametrize(("files", "sentence"), FOLDERS.values(), ids=FOLDERS)
def test_wrong_folders(files, sentence, tmp_path):
    for file in files:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, 0, 0) if path.suffix == ".png" else path.write_text("")
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence.format(tmp_path))):
        load("folder", tmp_path)


CALLS = {
    "name": (("mnist", "."), {}, "dataset='mnist': the sets are oxford_pets, stanford_cars"),
    "source": (("cifar10", "."), {"source": "web"}, "source='web': the choices are 'torchvision' and 'hub'"),
    "root": (("cifar10", None), {}, "root=None: say in which folder CIFAR-10 lies"),
    "negative seed": (("digits", None), {"seed": -1}, "seed=-1: expected a whole number from 0 up"),
    "seed of another kind": (("digits", None), {"seed": 1.0}, "seed=1.0: expected a whole number from 0 up"),
}


@pytest.mark.parametrize(("arguments", "options", "sentence"), CALLS.values(), ids=CALLS)
def test_wrong_calls(arguments, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        load(*arguments, **options)


def test_stanford_cars_without_scipy(tmp_path, monkeypatch):
    WRITERS["stanford_cars"](tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match="Stanford Cars needs scipy: python -m pip install scipy"):
        load("stanford_cars", tmp_path)


def test_resisc45_with_a_class_in_one_list_only(tmp_path):
    WRITERS["resisc45"](tmp_path)
    (tmp_path / "resisc45-val.txt").write_text("airplane_009.jpg\nlake_001.jpg\n")
    with pytest.raises(ValueError, match="the class 'basketball_court' is not in all of the three lists"):
        load("resisc45", tmp_path)


def test_a_few_of_many(tmp_path):
    WRITERS["folder"](tmp_path)
    test = load("folder", tmp_path).test
    few = first(test, 5, 0)
    assert len(few) == 5 and set(keys(few)) < set(keys(test))
    assert first(test, 12, 0) is test


def test_the_home_folder(tmp_path, monkeypatch):
    write_folder(tmp_path / "photos")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("folder", "~/photos").classes == ("blue", "green", "red")


def test_an_image_that_is_a_folder(tmp_path):
    with pytest.raises(ValueError, match="it cannot be read as an image"):
        open_image(tmp_path)
