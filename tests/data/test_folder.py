"""Folders of the user's own images: parts by many names, every format that PIL reads, what is left out, and what is said."""

import re

import numpy as np
import pytest
from PIL import Image

from loca_vision.data.description import described
from loca_vision.data.folder import test_part as part_for_testing
from loca_vision.data.images import open_image
from loca_vision.data.load import load, read
from support.image_folders import picture, save, write_folder

CLASSES = ("cat", "dog")


def write(root, *parts, count=3):
    for number, part in enumerate(parts):
        for label, name in enumerate(CLASSES):
            for index in range(count):
                save(root / part / name / f"{index}.png", label, 100 * number + index)


def sizes(splits):
    return tuple(len(images) for images in (splits.train, splits.validation, splits.test))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (("Train", "Test"), (5, 1, 6)),
        (("Training", "Testing"), (5, 1, 6)),
        (("train_set", "test_set"), (5, 1, 6)),
        (("TRAIN-IMAGES", "test data"), (5, 1, 6)),
        (("train", "valid", "test"), (6, 6, 6)),
        (("train", "val", "test"), (6, 6, 6)),
        (("training", "validation"), (5, 6, 1)),
        (("train",), (4, 1, 1)),
    ],
    ids=lambda value: "/".join(map(str, value)),
)
def test_parts_are_known_by_many_names(parts, expected, tmp_path):
    write(tmp_path, *parts)
    splits = load("folder", tmp_path)
    assert (splits.classes, sizes(splits)) == (CLASSES, expected)
    said = described(splits)
    assert all(f"from {part}/" in said for part in parts)


def test_a_class_may_have_the_name_of_a_part(tmp_path):
    for label, name in enumerate(("bus", "train")):
        for index in range(10):
            save(tmp_path / name / f"{index}.png", label, index)
    assert load("folder", tmp_path).classes == ("bus", "train")
    write(tmp_path / "other", "valid", "invalid", count=10)  # a folder for each camera, say
    assert read("folder", tmp_path / "other").classes == ("invalid", "valid")


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (("Train", "training", "test"), "expected one folder for the train images, got Train/ and training/; rename one"),
        (("test", "val"), "expected a folder train/ next to test/, val/, got none"),
        (("seg_train", "seg_test"), "seg_test/, seg_train/ look like parts with classes in them; call them train/, val/"),
    ],
)
def test_parts_that_are_not_clear_are_refused(parts, sentence, tmp_path):
    write(tmp_path, *parts)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(sentence)):
        load("folder", tmp_path)


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "__MACOSX", "@eaDir", ".hidden"])
def test_hidden_folders_are_no_classes(name, tmp_path):
    write(tmp_path, "train", "test")
    for part in ("train", "test"):
        save(tmp_path / part / name / "1.png", 0, 0)
    save(tmp_path / "train" / "cat" / ".thumbnails" / "1.png", 0, 0)
    splits = load("folder", tmp_path)
    assert (splits.classes, sizes(splits)) == (CLASSES, (5, 1, 6))
    assert f"left out, 2 hidden, of the system or of a run: train/{name}, train/cat/.thumbnails" in described(splits)


@pytest.mark.parametrize("place", ["out", "runs/first"])
def test_the_output_of_a_run_is_no_class(place, tmp_path):
    write_folder(tmp_path, flat=10)
    save(tmp_path / place / "curves.png", 0, 0)
    (tmp_path / place / "config.yaml").write_text("")
    splits = load("folder", tmp_path)
    assert splits.classes == ("blue", "green", "red") and sum(sizes(splits)) == 30
    assert f"of a run: {place}" in described(splits)


FORMATS = {"jfif": "JPEG", "gif": "GIF", "avif": "AVIF", "jp2": "JPEG2000", "JPG": "JPEG", "webp": "WEBP", "tif": "TIFF"}


def test_every_format_that_pil_reads_is_read(tmp_path):
    write(tmp_path, "train", "test")
    for ending, name in FORMATS.items():
        Image.fromarray(picture(0, 1)).save(tmp_path / "train" / "cat" / f"a.{ending}", name)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "cat" / "movie.mpg").write_bytes(b"\x00\x00\x01\xb3")
    splits = load("folder", tmp_path)
    assert sum(sizes(splits)[:2]) == 6 + len(FORMATS)
    assert all(image.mode == "RGB" for image, _ in (splits.train[i] for i in range(len(splits.train))))
    assert "not read, 2 files that are not images of a class: train/cat/movie.mpg, train/cat/notes.txt" in described(splits)


def test_images_outside_a_class_are_named(tmp_path):
    write_folder(tmp_path, flat=10)
    save(tmp_path / "loose.png", 0, 0)
    assert "files that are not images of a class: loose.png" in described(load("folder", tmp_path))


def test_what_is_next_to_the_parts_is_named(tmp_path):
    write(tmp_path, "train", "test", "more")
    assert "not read, next to the parts: more" in described(load("folder", tmp_path))


def test_the_classes_and_their_images_are_said(tmp_path):
    write(tmp_path, "train", "test")
    said = described(load("folder", tmp_path)).splitlines()
    assert said[0] == "images: 5 for training, 1 for validation (1/10 of 6, drawn by the seed), 6 for testing"
    assert re.fullmatch(r"classes: cat \([23]\), dog \([23]\)", said[1])
    assert said[2] == "parts: train from train/, test from test/"


def test_a_class_name_that_is_not_utf_8(tmp_path):
    write(tmp_path, "train", "test")
    for part in (b"train", b"test"):
        folder = bytes(tmp_path) + b"/" + part
        try:
            (tmp_path / part.decode() / "dog").rename(folder.decode() + "/caf\udce9")
        except (OSError, UnicodeEncodeError):
            pytest.skip("the file system takes UTF-8 only")
    with pytest.raises(ValueError, match=re.escape(r"expected class names in UTF-8, got the folder b'caf\xe9'; rename it")):
        load("folder", tmp_path)


def test_the_test_part_alone(tmp_path):
    write(tmp_path, "Testing")
    found = part_for_testing(tmp_path)
    assert (found.classes, len(found.train)) == (CLASSES, 6)
    write_folder(tmp_path / "flat", flat=2)
    assert part_for_testing(tmp_path / "flat") is None


def test_a_circle_of_links_ends(tmp_path):
    write(tmp_path, "train", "test")
    (tmp_path / "train" / "cat" / "again").symlink_to(tmp_path / "train" / "cat")
    assert sum(sizes(load("folder", tmp_path))[:2]) == 6


# Pixels


def upright():
    return Image.fromarray(np.repeat(np.repeat(picture(0, 0, (6, 8)), 8, 0), 8, 1))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_photographs_are_upright(orientation, ending, tmp_path):
    """Written as a camera writes it, so that turning it back gives the scene."""
    backwards = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    scene, exif = upright(), Image.Exif()
    exif[0x0112] = orientation
    stored = scene.transpose(backwards[orientation]) if orientation > 1 else scene
    stored.save(tmp_path / f"a.{ending}", exif=exif, **({"quality": 95} if ending in ("jpg", "webp") else {}))
    seen = open_image(tmp_path / f"a.{ending}")
    assert seen.size == scene.size
    assert np.abs(np.asarray(seen, float) - np.asarray(scene, float)).mean() < 8


def test_a_broken_exif_block_leaves_the_image_as_it_is(tmp_path):
    upright().save(tmp_path / "a.png", exif=b"Exif\x00\x00no such thing")
    assert open_image(tmp_path / "a.png").size == (64, 48)


def test_every_kind_of_pixels_is_the_same_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    images = {
        "grey": Image.fromarray(grey),
        "grey and alpha": Image.merge("LA", [Image.fromarray(grey), Image.new("L", (8, 8), 100)]),
        "colour and alpha": Image.merge("RGBA", [Image.fromarray(grey)] * 3 + [Image.new("L", (8, 8), 100)]),
        "16 bits": Image.fromarray(grey.astype(np.uint16) * 257),
        "palette": Image.fromarray(grey).convert("P"),
    }
    for name, image in images.items():
        image.save(tmp_path / "a.png")
        assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.stack([grey] * 3, -1)), name
    Image.merge("CMYK", [Image.new("L", (8, 8))] * 3 + [Image.fromarray(255 - grey)]).save(tmp_path / "a.tif")
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.tif")), np.stack([grey] * 3, -1))
