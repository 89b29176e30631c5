"""Checkpoints of a run: rotation."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loca_vision.storage import atomic_folder
from loca_vision.storage.run_checkpoint import latest_checkpoint
from support.checkpoints import flip, names, write


def test_the_newest_whole_ones_stay(tmp_path: Path) -> None:
    for step in range(6):
        write(tmp_path, step)
    flip(tmp_path / "checkpoint-5" / "state.json")
    flip(tmp_path / "checkpoint-3" / "state.json")
    write(tmp_path, 6, keep=3)
    assert names(tmp_path) == {"checkpoint-6", "checkpoint-5", "checkpoint-4", "checkpoint-3", "checkpoint-2"}
    write(tmp_path, 7, keep=3)
    assert names(tmp_path) == {"checkpoint-7", "checkpoint-6", "checkpoint-5", "checkpoint-4"}
    write(tmp_path, 8, keep=1)
    assert names(tmp_path) == {"checkpoint-8"}


def test_what_was_just_written_stays_even_if_it_is_not_the_newest(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(tmp_path, step)
    write(tmp_path, 15, keep=1)
    assert names(tmp_path) == {"checkpoint-15", "checkpoint-30"}


def test_nothing_is_deleted_before_the_new_one_lies_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step)
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def sync(descriptor: int) -> None:
        about = os.fstat(descriptor)
        place = "run" if about.st_ino == tmp_path.stat().st_ino else "folder"
        events.append(f"sync {place}" if stat.S_ISDIR(about.st_mode) else "sync file")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append(f"{self.name.split('.')[0]} {'aside' if '.tmp' in target.name else 'in place'}")
        assert latest_checkpoint(tmp_path) is not None
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "rename", renamed)
    write(tmp_path, 4, keep=1)
    assert events == ["sync file"] * 3 + ["sync folder", "checkpoint-4 in place", "sync run"] + [
        f"checkpoint-{step} aside" for step in (1, 2, 3)
    ]


def test_an_old_one_that_cannot_be_deleted_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    monkeypatch.setattr(atomic_folder.shutil, "rmtree", failing(OSError(errno.EACCES, "Permission denied")))
    assert write(tmp_path, 2, keep=1).is_dir()
    assert "checkpoint-1: this old checkpoint could not be deleted (Permission denied)" in caplog.text


def test_a_reader_while_another_process_rotates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was listed is gone when it is opened; what has come instead is found."""
    from loca_vision.storage import run_checkpoint as checkpoint_folder

    write(tmp_path, 1)
    verify, todo = checkpoint_folder.verify, [2]

    def slow(path: Path, step: int | None) -> None:
        if todo:
            write(tmp_path, todo.pop(), keep=1)
        verify(path, step)

    monkeypatch.setattr(checkpoint_folder, "verify", slow)
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail
