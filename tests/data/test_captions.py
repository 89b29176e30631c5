"""Images and captions from every kind of source, and what is said of sources that are not as they should be."""

import gc
import os
import re
import sys
from zipfile import ZipFile

import numpy as np
import pytest

from loca_vision.data.captions import CaptionedImages, read_captioned
from loca_vision.data.rows import RowImages
from loca_vision.data.stored_images import FolderImages
from support.captioned import write_beside, write_images, write_table
from support.pairs import picture

datasets = pytest.importorskip("datasets")
THREE = {"a.png": "a red fox", "b.png": "ein grünes Haus", "deep/c.png": "three\nlines"}


def read(source, tmp_path, **settings):
    return read_captioned(source, cache_dir=tmp_path / "cache", **settings)


def assert_pictures(there, captions, first=0):
    """They are pictures `first`, `first` + 1, ... with these captions, which are known without the images."""
    assert there.captions == list(captions) and len(there) == len(captions)
    for index, caption in enumerate(captions):
        image, said = there[index]
        assert image.mode == "RGB" and said == caption
        assert np.array_equal(np.asarray(image), np.asarray(picture(first + index)))
    assert there.sizes == [picture(0).size] * len(captions)


def parquet(path, captions, images=None, kind=None, name="image"):
    rows = {name: images or [picture(i) for i in range(len(captions))], "text": captions}
    features = datasets.Features({name: datasets.Image(), "text": kind or datasets.Value("string")})
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features).to_parquet(str(path))
    return path


def pointing(path):
    """One row with no image of its own, but a path."""
    kinds = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    rows = datasets.Dataset.from_dict({"image": [{"path": path, "bytes": None}], "text": ["x"]}, kinds)
    return CaptionedImages(RowImages(rows, "image", "rows"), ["x"], "rows")


# The sources


def test_text_files_beside_images(tmp_path):
    folder = write_beside(tmp_path / "set", THREE)
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf  a red fox\n\n")
    assert_pictures(read(folder, tmp_path), THREE.values())


def test_text_files_need_no_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert_pictures(read(write_beside(tmp_path / "set", THREE), tmp_path), THREE.values())
    with pytest.raises(ModuleNotFoundError, match=r"loca-vision\[train\]"):
        read("user/set", tmp_path)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_table(ending, tmp_path):
    folder = write_table(tmp_path / "set", THREE)
    if ending == "csv":
        (folder / "metadata.jsonl").unlink()
        rows = "".join(f'{name},"{caption}"\n' for name, caption in THREE.items())
        (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    assert_pictures(read(folder, tmp_path), THREE.values())
    gc.collect()  # `datasets` leaves the .csv open


def test_parquet_files_alone_and_in_a_folder(tmp_path):
    file = parquet(tmp_path / "set" / "train.parquet", ["x", "y"])
    for source in (file, file.parent, str(file)):
        assert_pictures(read(source, tmp_path), ["x", "y"])


def test_other_columns(tmp_path):
    folder = write_table(tmp_path / "set", THREE, prompt="other")
    there = read(folder, tmp_path, caption_column="prompt")
    assert_pictures(there, ["other"] * 3)
    assert there.digests.keys() == there.some(2, 0).digests.keys() == {"image", "prompt"}
    file = parquet(tmp_path / "drawings.parquet", ["x"], name="drawing")
    assert_pictures(read(file, tmp_path, image_column="drawing"), ["x"])


def test_a_data_set_on_the_hub(tmp_path, monkeypatch):
    asked = []
    rows = datasets.Dataset.from_dict({"image": [picture(0)], "text": ["x"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda source, **more: asked.append((source, more)) or rows)
    there = read_captioned("user/set", config="large", revision="main", split="test")
    assert_pictures(there, ["x"])
    assert there.where == "user/set (test)"
    assert asked == [("user/set", {"revision": "main", "name": "large", "split": "test", "cache_dir": None})]


def test_of_a_list_of_captions_the_first_counts(tmp_path):
    lists = datasets.Features({"x": [datasets.Value("string")]})["x"]
    file = parquet(tmp_path / "lists.parquet", [["x", "y"], ["z"]], kind=lists)
    assert_pictures(read(file, tmp_path), ["x", "z"])
    file = parquet(tmp_path / "empty.parquet", [["x"], []], kind=lists)
    with pytest.raises(ValueError, match="row 1: there is no text in text"):
        read(file, tmp_path)


def test_images_in_an_archive_on_this_machine(tmp_path):
    write_images(tmp_path, ["a.png"])
    with ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.write(tmp_path / "a.png", "in/a.png")
    assert_pictures(pointing(f"zip://in/a.png::{tmp_path}/set.zip"), ["x"])


# One caption for all


def test_one_caption_for_bare_images(tmp_path):
    folder = write_images(tmp_path / "set", THREE)
    there = read(folder, tmp_path, caption="a photo of sks dog")
    assert_pictures(there, ["a photo of sks dog"] * 3)
    assert there.notes == () and there.digests.keys() == {"image", "text"}


def test_one_caption_counts_whatever_else_is_there(tmp_path):
    tabled, beside = write_table(tmp_path / "table", THREE), write_beside(tmp_path / "beside", THREE)
    for folder, unread in ((tabled, "metadata.jsonl"), (beside, "a.txt, b.txt, deep/c.txt")):
        there = read(folder, tmp_path, caption="x")
        assert_pictures(there, ["x"] * 3)
        assert there.notes == (f"not read, files of captions, since one is given for all: {unread}",)
    file = parquet(tmp_path / "set.parquet", ["", ""])  # its own captions would be refused
    there = read(file, tmp_path, caption="x", caption_column="none")
    assert_pictures(there, ["x", "x"])
    assert there.digests.keys() == {"image", "text"}


@pytest.mark.parametrize("caption", ["", "  ", 3])
def test_a_caption_that_is_none(caption, tmp_path):
    with pytest.raises(ValueError, match=f"caption={caption!r}: expected a text"):
        read(tmp_path, tmp_path, caption=caption)


# Splits, samples, digests


@pytest.mark.parametrize("write", [write_table, write_beside])
def test_the_images_of_the_split_only(write, tmp_path):
    for split, names in {"train": ["a.png", "b.png"], "test": ["c.png"]}.items():
        write(tmp_path / "set" / split, {name: f"{split} {name}" for name in names})
    for split, captions in {"train": ["train a.png", "train b.png"], "test": ["test c.png"]}.items():
        there = read(tmp_path / "set", tmp_path, split=split)
        assert_pictures(there, captions)
        (note,) = there.notes
        assert note.endswith("test/c.png" if split == "train" else "train/a.png, train/b.png")


def test_a_split_that_is_not_there(tmp_path):
    write_beside(tmp_path / "set", THREE)
    for split in ("test", "..", "deep/..", ""):
        with pytest.raises(ValueError, match=re.escape(f"split={split!r}: expected a folder {split}/ with images")):
            read(tmp_path / "set", tmp_path, split=split)


@pytest.mark.parametrize("write", [write_table, write_beside])
def test_some_of_them_are_drawn_by_the_seed(write, tmp_path):
    folder = write(tmp_path / "set", {f"{i:02}.png": f"caption {i}" for i in range(12)})
    there = read(folder, tmp_path)
    chosen = [there.some(5, seed).captions for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2] and len(set(chosen[0])) == 5
    assert there.some(None, 0) is there and there.some(12, 0) is there
    few = read(folder, tmp_path, max_samples=5, seed=1)
    assert few.captions == chosen[2] and few.digests == there.some(5, 1).digests != there.digests
    for image, caption in (few[i] for i in range(5)):
        assert np.array_equal(np.asarray(image), np.asarray(picture(int(caption.split()[1]))))
    with pytest.raises(ValueError, match="max_samples=0"):
        read(folder, tmp_path, max_samples=0)


@pytest.mark.parametrize("write", [write_table, write_beside])
def test_digests_tell_what_changed(write, tmp_path):
    before = read(write(tmp_path / "one", THREE), tmp_path).digests
    assert read(write(tmp_path / "two", THREE), tmp_path).digests == before, "wherever the folder lies"
    texts = read(write(tmp_path / "texts", THREE | {"a.png": "another"}), tmp_path).digests
    assert texts["image"] == before["image"] and texts["text"] != before["text"]
    names = read(write(tmp_path / "names", {"A.png": "a red fox"} | dict(list(THREE.items())[1:])), tmp_path).digests
    assert names["image"] != before["image"] and names["text"] == before["text"]
    picture(9, (30, 30)).save(tmp_path / "two" / "a.png")
    assert read(tmp_path / "two", tmp_path).digests["image"] != before["image"]


# What is left out is told


def test_a_table_counts_before_text_files_and_says_so(tmp_path):
    folder = write_table(tmp_path / "set", THREE)
    write_beside(folder, {"b.png": "not this", "d.png": "nor this"})
    picture(1).save(folder / "b.png")
    there = read(folder, tmp_path)
    assert_pictures(there, THREE.values())
    assert there.notes == (
        "not read, images that the table of the split does not name: d.png",
        "not read, .txt files beside images, since there is a table: b.txt, d.txt",
    )
    assert there.some(2, 0).notes == there.notes


def test_what_beside_captions_is_not_read_is_told(tmp_path):
    folder = write_beside(tmp_path / "set", {"a.png": "x"})
    for name in ("readme.txt", "b.heic"):
        (folder / name).write_text("y")
    assert read(folder, tmp_path).notes == (
        "not read, .txt files without an image: readme.txt",
        "not read, files that are not images: b.heic",
    )


def test_hidden_files_and_outputs_of_runs_are_left_out(tmp_path):
    folder = write_beside(tmp_path / "set", {"a.png": "x"})
    write_beside(folder, {".hidden/b.png": "y", "output/c.png": "z", ".d.png": "v"})
    (folder / "output" / "metrics.json").write_text("{}")
    there = read(folder, tmp_path)
    assert there.captions == ["x"]
    assert there.notes == ("not read, hidden, of the system or of a run: .d.png, .d.txt, .hidden, output",)


def test_a_name_that_is_not_utf8(tmp_path):
    folder = write_beside(tmp_path / "set", {"a.png": "x"})
    for ending in (b"png", b"txt"):
        (folder / f"a.{ending.decode()}").rename(os.fsdecode(os.fsencode(folder) + b"/\xff." + ending))
    there = read(folder, tmp_path)
    assert_pictures(there, ["x"])
    assert len(there.digests["image"]) == 16


# What is refused


def test_images_without_captions_are_told_the_three_ways(tmp_path):
    folder = write_images(tmp_path / "set", THREE)
    with pytest.raises(ValueError, match=r"metadata\.jsonl .*, a \.txt .*, or one caption for all images, got images alone$"):
        read(folder, tmp_path)
    (folder / "readme.txt").write_text("x")
    with pytest.raises(ValueError, match=r"got images alone; there are \.txt files without an image: readme\.txt"):
        read(folder, tmp_path)


def test_captions_that_are_missing_empty_or_unreadable_are_counted_and_named(tmp_path):
    folder = write_beside(tmp_path / "set", {f"{i}.png": "x" for i in range(5)})
    (folder / "0.txt").unlink()
    (folder / "1.txt").rename(folder / "one.txt")
    (folder / "2.txt").write_text(" \n")
    (folder / "3.txt").write_bytes("é".encode("latin-1"))
    sentence = (
        "expected a caption for each of 5 images, got no .txt beside 2 (0.png, 1.png) and an empty .txt beside 1 (2.png) and "
        "a .txt that is not UTF-8 beside 1 (3.png); there are .txt files without an image: one.txt"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        read(folder, tmp_path)


@pytest.mark.parametrize("text", [None, "", "  "])
def test_a_row_without_text(text, tmp_path):
    with pytest.raises(ValueError, match=r"set\.parquet \(train\), row 1: there is no text in text"):
        read(parquet(tmp_path / "set.parquet", ["x", text]), tmp_path)


def test_columns_that_are_missing_or_of_another_kind(tmp_path):
    folder = write_table(tmp_path / "set", THREE, number=3)
    for settings, sentence in (
        ({"image_column": "imge"}, "image_column='imge': "),
        ({"caption_column": "tex"}, "has no such column, only image, text, number; perhaps text"),
        ({"caption_column": "number"}, "the column number holds int64, not texts"),
        ({"caption_column": "image"}, "the column image holds "),
        ({"image_column": "text"}, "the column text holds string, not images"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            read(folder, tmp_path, **settings)


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["x"]})}).save_to_disk(str(tmp_path / "saved"))
    for source, sentence in (
        (tmp_path / "empty", "got a folder without any"),
        (tmp_path / "missing", "there is no such folder or file"),
        (write_images(tmp_path, ["one.png"]) / "one.png", "cannot be read as a data set"),
        (tmp_path / "saved", "save_to_disk"),
    ):
        with pytest.raises((OSError, ValueError), match=sentence) as caught:
            read(source, tmp_path)
        assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="x: expected images with captions, got none"):
        CaptionedImages(FolderImages((), tmp_path), [], "x")


def test_rows_that_point_elsewhere(tmp_path):
    """No address is asked, no pipe waited for; what a path on this machine names has to be an image."""
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "text.png").write_text("secret")
    for path, sentence in (
        ("https://example.invalid/a.png", r"row 0, image \(a\.png\): expected the image itself or its file on this machine"),
        ("zip://a.png::https://example.invalid/b.zip", "expected the image itself or its file on this machine"),
        (str(tmp_path / "pipe.png"), "there is no such image"),
        (str(tmp_path), "there is no such image"),
        (str(tmp_path / "text.png"), "it cannot be read as an image$"),
    ):
        for look in (lambda there: there[0], lambda there: there.sizes):
            with pytest.raises((ValueError, FileNotFoundError), match=sentence):
                look(pointing(path))
