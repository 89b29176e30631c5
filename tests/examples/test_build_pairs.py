"""Pairs from a folder of photographs: the result is a function of content and seed, survives a kill, and loads."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from loca_vision.data.photographs import Photograph, photographs_in
from photo_pairs import INSTRUCTIONS, crops_of, instruction_for, split_of
from support.photographs import SCRIPT, photograph, script

pytest.importorskip("cv2")


@pytest.fixture(scope="module")
def builder():
    return script()


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(["a.png", "deep/b.jpg", "deep/er/c.webp", "d.bmp", "e.TIF", "f.gif"]):
        photograph(tmp_path / "photos" / name, number)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / ".hidden.png").write_bytes(b"no image")
    return tmp_path / "photos"


@pytest.fixture
def quick(builder, monkeypatch):
    """Another picture in the cartoon's place, for tests in which it does not matter which."""
    monkeypatch.setattr(builder, "cartoon", ImageOps.invert)


SMALL = ["--size", "16", "--crops", "2"]


def built(builder, folder, out, *more):
    assert builder.main([str(folder), str(out), *SMALL, *more]) == 0
    return {file.relative_to(out): file.read_bytes() for file in sorted(out.rglob("*")) if file.is_file()}


def test_instructions_are_some_thirty_different_sentences():
    assert len(set(INSTRUCTIONS)) == len(INSTRUCTIONS) == 30 and all(text.strip() == text for text in INSTRUCTIONS)


def test_photographs_are_found_in_all_folders_once(folder):
    (folder / "twice.png").write_bytes((folder / "a.png").read_bytes())
    found = photographs_in(folder)
    assert sorted(p.file.name for p in found) == ["a.png", "b.jpg", "c.webp", "d.bmp", "e.TIF", "f.gif"]
    assert [p.content for p in found] == sorted(p.content for p in found)


def test_parts_have_their_shares_and_nobody_moves():
    some = [Photograph(Path("x"), f"{number:064x}") for number in range(2000)]
    parts = [split_of(p, 0, 0.2, 0.1) for p in some]
    assert abs(parts.count("validation") / 2000 - 0.2) < 0.03 and abs(parts.count("test") / 2000 - 0.1) < 0.03
    assert parts != [split_of(p, 1, 0.2, 0.1) for p in some]
    assert {split_of(p, 0, 0, 0) for p in some} == {"train"}


def test_crops_of_one_photograph_are_different_and_asked_for_differently(tmp_path):
    one = photographs_in(photograph(tmp_path / "p.png", 1, 96).parent)[0]
    crops = [np.asarray(crop) for crop in crops_of(one, 0, 32, 4)]
    assert len(crops) == 4 and all(crop.shape == (32, 32, 3) for crop in crops)
    assert len({crop.tobytes() for crop in crops}) == 4
    assert len({instruction_for(one, 0, crop) for crop in range(4)}) == 4
    assert [c.tobytes() for c in crops_of(one, 0, 32, 2)] == [c.tobytes() for c in crops[:2]]
    assert list(crops_of(one, 0, 97, 4)) == []


def test_a_turned_photograph_is_turned_back(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned to the right
    image = Image.new("RGB", (40, 20), "white")
    image.paste("black", (0, 0, 20, 20))
    image.save(tmp_path / "p.png", exif=exif)
    (crop,) = crops_of(photographs_in(tmp_path)[0], 0, 16, 1)
    grey = np.asarray(crop.convert("L"))
    assert grey[0].mean() < grey[-1].mean()


def test_the_same_bytes_every_time_and_without_making_them_again(builder, folder, tmp_path, monkeypatch):
    first = built(builder, folder, tmp_path / "one")
    assert built(builder, folder, tmp_path / "two") == first
    monkeypatch.setattr(builder, "cartoon", None)  # nothing is drawn again
    assert built(builder, folder, tmp_path / "one") == first


def test_more_photographs_leave_those_that_are_there(builder, quick, folder, tmp_path):
    before = built(builder, folder, tmp_path / "out")
    for number in range(6, 12):
        photograph(folder / f"{number}.png", number)
    after = built(builder, folder, tmp_path / "out")
    images = {name: data for name, data in before.items() if name.suffix == ".png"}
    assert images.items() <= after.items() and len(after) > len(before)


def test_no_photograph_is_in_two_parts(builder, quick, folder, tmp_path):
    files = built(builder, folder, tmp_path / "out", "--validation_share", "0.3", "--test_share", "0.3", "--seed", "3")
    names = {}
    for file in (name for name in files if name.suffix == ".png"):
        names.setdefault(file.name[:16], set()).add(file.parts[0])
    assert len(names) == 6 and all(len(parts) == 1 for parts in names.values())
    assert len(set.union(*names.values())) > 1


def test_datasets_reads_it_with_three_columns(builder, folder, tmp_path):
    datasets = pytest.importorskip("datasets")
    built(builder, folder, tmp_path / "out")
    rows = datasets.load_dataset(str(tmp_path / "out"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.column_names == ["original_image", "edit_prompt", "cartoonized_image"]
    row = rows[0]
    assert row["original_image"].size == row["cartoonized_image"].size == (16, 16) and row["edit_prompt"] in INSTRUCTIONS
    assert np.asarray(row["original_image"]).tobytes() != np.asarray(row["cartoonized_image"]).tobytes()


def test_the_card_says_what_it_is(builder, quick, folder, tmp_path):
    card = built(builder, folder, tmp_path / "out")[Path("README.md")].decode()
    assert "targets made by a fixed OpenCV filter" in card and "licences are those of the photographs" in card
    assert card.startswith("---\nlicense: other\n") and "| train |" in card


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--size", "8"], "size=8"),
        (["--crops", "0"], "crops=0"),
        (["--test_share", "1"], "test_share=1.0"),
        (["--test_share", "0.5", "--validation_share", "0.5"], "none is left to train"),
        (["--size", "1000"], "of 6 photographs none is that large"),
        (["--colour", "red"], "colour"),
    ],
)
def test_a_mistake_is_one_line(builder, quick, folder, tmp_path, capsys, more, sentence):
    assert builder.main([str(folder), str(tmp_path / "out"), *more]) == 2
    said = capsys.readouterr().err
    assert sentence in said.splitlines()[-1] and said.splitlines()[-1].startswith("build_pairs.py: ")


def test_other_settings_and_other_folders_are_refused(builder, quick, folder, tmp_path, capsys):
    before = built(builder, folder, tmp_path / "out")
    assert builder.main([str(folder), str(tmp_path / "out"), "--size", "16", "--crops", "3"]) == 2
    assert "crops=2, not 3" in capsys.readouterr().err
    assert built(builder, folder, tmp_path / "out") == before
    assert builder.main([str(folder), str(folder / "deep"), *SMALL]) == 2
    assert "lies among the photographs" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not touch")
    assert builder.main([str(folder), str(tmp_path / "mine"), *SMALL]) == 2
    assert "something else is there" in capsys.readouterr().err
    assert builder.main([str(tmp_path / "nowhere"), str(tmp_path / "new"), *SMALL]) == 2
    assert "nowhere: there is no such folder" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_a_broken_photograph_is_named_and_what_was_made_stays(builder, quick, folder, tmp_path, capsys):
    (folder / "broken.jpg").write_bytes((folder / "deep" / "b.jpg").read_bytes()[:300])
    assert builder.main([str(folder), str(tmp_path / "out"), *SMALL]) == 2
    assert "broken.jpg: it cannot be read as an image" in capsys.readouterr().err
    (folder / "broken.jpg").unlink()
    assert built(builder, folder, tmp_path / "out") == built(builder, folder, tmp_path / "new")


def test_photographs_that_are_too_small_are_counted(builder, quick, folder, tmp_path, capsys):
    photograph(folder / "tiny.png", 9, 12)
    built(builder, folder, tmp_path / "out")
    assert "1 of the photographs smaller than 16 pixels, left out" in capsys.readouterr().out


def test_a_killed_run_goes_on(builder, folder, tmp_path):
    for number in range(6, 14):
        photograph(folder / f"{number}.png", number)
    whole = built(builder, folder, tmp_path / "whole")
    out = tmp_path / "out"
    killed = subprocess.Popen([sys.executable, SCRIPT, folder, out, *SMALL], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while len(list(out.rglob("*.png"))) < 4 and killed.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    part = {file: file.stat().st_mtime_ns for file in out.rglob("*.png") if not file.name.startswith(".")}
    assert len(part) >= 4
    again = built(builder, folder, out)
    assert {name: data for name, data in again.items() if ".tmp" not in name.name} == whole
    assert all(file.stat().st_mtime_ns == when for file, when in part.items())
    rows = [json.loads(line) for line in again[Path("train/metadata.jsonl")].splitlines()]
    assert set(rows[0]) == {"original_image_file_name", "edit_prompt", "cartoonized_image_file_name"}
