"""Checkpoints of a run: finding the latest one."""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loca_vision.storage.run_checkpoint import latest_checkpoint, read_checkpoint
from loca_vision.storage.run_manifest import make_manifest
from support.checkpoints import flip, names, write
from support.time_limit import within

FILES = ("state.safetensors", "state.json", "manifest.json")


def forge(path: Path, **changed: bytes) -> None:
    """A manifest that is right about files that are wrong."""
    for name, data in changed.items():
        (path / name.replace("__", ".")).write_bytes(data)
    files = {name: (path / name).read_bytes() for name in FILES[:2]}
    (path / "manifest.json").write_bytes(make_manifest(1, files))


def test_the_latest_is_the_one_of_the_largest_step(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "none") is None
    for step in (9, 100, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoint-0999").mkdir()
    (tmp_path / "checkpoint-1000.txt").write_text("")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def sparse(path: Path) -> None:
    os.truncate(path, 2**40)


def link_out(path: Path) -> None:
    path.rename(path.parents[1] / f"outside {path.name}")
    path.symlink_to(path.parents[1] / f"outside {path.name}")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "flipped": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "sparse": sparse,
    "deleted": Path.unlink,
    "linked": link_out,
    "fifo": fifo,
    "folder": directory,
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_the_checkpoint_passed_over(
    damage: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    random.seed(f"{damage} {name}")
    for attempt in range(40 if damage == "flipped" else 1):
        run = tmp_path / str(attempt)
        good, bad = write(run, 1), write(run, 2)
        DAMAGES[damage](bad / name)
        caplog.clear()
        with within(10), caplog.at_level(logging.WARNING), pytest.raises((ValueError, FileNotFoundError)) as caught:
            read_checkpoint(bad)
        named = (bad / name, *([bad / other for other in FILES] if (damage, name) == ("flipped", "manifest.json") else []))
        assert str(caught.value).startswith(tuple(f"{path}: " for path in named)) and str(caught.value).isprintable()
        with within(10):
            assert latest_checkpoint(run) == good
        assert [record.getMessage() for record in caplog.records] == [f"passed over as damaged: {caught.value}"]


def test_what_does_not_belong_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path, 1)
    (path / ".DS_Store").write_text("of a file manager")
    assert latest_checkpoint(tmp_path) == path
    (path / "model.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(ValueError, match=r"'model\.pkl': the manifest has no such file"):
        read_checkpoint(path)
    assert latest_checkpoint(tmp_path) is None and "model.pkl" in caplog.text


def test_another_name(tmp_path: Path) -> None:
    """A checkpoint may be called anything, but not be of another step than its name says."""
    path = write(tmp_path, 1).rename(tmp_path / "best")
    assert read_checkpoint(path)[1] == {"step": 1}
    path.rename(tmp_path / "checkpoint-2")
    with pytest.raises(ValueError, match="it is of step 1, not of 2"):
        read_checkpoint(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("kind", ["link", "file", "fifo"])
def test_what_is_no_folder_is_no_checkpoint(kind: str, tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", write(tmp_path / "elsewhere", 2)
    good, odd = write(run, 1), run / "checkpoint-2"
    if kind == "link":
        odd.symlink_to(elsewhere)
    else:
        odd.write_text("x") if kind == "file" else os.mkfifo(odd)
    with within(10):
        assert latest_checkpoint(run) == good
        with pytest.raises(OSError, match=r"checkpoint-2: it could not be written \(something other than a folder is there\)"):
            write(run, 2)
        write(run, 3, keep=1)
    assert names(run) == {"checkpoint-3", "checkpoint-2"} and latest_checkpoint(elsewhere.parent) == elsewhere


MANIFESTS = {
    "no JSON": b"{",
    "a list": b"[]",
    "no text": b"\xff",
    "twice": b'{"files": {}, "files": {}, "format": "loca-vision checkpoint 1", "step": 1}',
    "deep": b"[" * 60_000,
    "a long number": b'{"step": ' + b"9" * 60_000 + b"}",
    "large": b" " * 70_000,
    "nothing": b"null",
}


@pytest.mark.parametrize("data", MANIFESTS.values(), ids=MANIFESTS)
def test_manifests_that_are_none(data: bytes, tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    (path / "manifest.json").write_bytes(data)
    with within(10), pytest.raises(ValueError, match=r"manifest\.json: it "):
        read_checkpoint(path)


def _facts(path: Path, **changed: Any) -> None:
    fields = json.loads((path / "manifest.json").read_text()) | changed
    (path / "manifest.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")


@pytest.mark.parametrize(
    "facts",
    [{"size": size} for size in (10**30, -1, 1.5, True)] + [{"sha256": text} for text in ("x", None, "0" * 64)] + [{"more": 1}],
)  # fmt: skip
def test_manifests_that_lie_about_a_file(facts: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    _facts(path, files=files | {"state.json": files["state.json"] | facts})
    with pytest.raises(ValueError, match=r"(manifest|state)\.json: it"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "x"])
def test_a_manifest_names_no_other_files(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    files = json.loads((path / "manifest.json").read_text())["files"]
    _facts(path, files=files | {name: files["state.json"]})
    with pytest.raises(ValueError, match="it is not a manifest as this version writes it"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b'{"a": 1, "a": 1}', "state.json: the key 'a' comes twice"),
        (b'{"a": NaN}', "state.json: NaN is not a JSON number"),
        (b"[1]", "state.json: it is not a table"),
        (b"[" * 100_000, "state.json: its JSON is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "state.json: 9+ is too long"),
        (b"\x80\x04.", "state.json: "),
    ],
)
def test_hostile_states_with_true_hashes(data: bytes, sentence: str, tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    forge(path, state__json=data)
    with within(10), pytest.raises(ValueError, match=sentence):
        read_checkpoint(path)


def test_a_state_too_large_to_be_one(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    with (path / "state.json").open("r+b") as file:
        file.truncate(2**26 + 1)
    forge(path)
    with within(10), pytest.raises(ValueError, match=r"state\.json: it has more than 67108864 bytes"):
        read_checkpoint(path)


def test_hostile_tensors_with_true_hashes(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    for data, sentence in (
        (b"\x80\x04.xxxxxxxx", "it is a pickle"),
        ((2**40).to_bytes(8, "little") + b"{", "it is not a safetensors file"),
    ):
        forge(path, state__safetensors=data)
        with pytest.raises(ValueError, match=rf"state\.safetensors: {sentence}"):
            read_checkpoint(path)
