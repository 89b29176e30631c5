"""Checkpoints of a run: faults."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loca_vision.storage import atomic_file as atomic
from loca_vision.storage.run_checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint
from support.checkpoints import content, names, write
from support.sudden_death import run_script

resource = pytest.importorskip("resource", reason="signals, modes and limits of POSIX")


ROOT = Path(__file__).parents[3]


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("step", [1, 2], ids=["replaced", "new"])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"]
)
@pytest.mark.parametrize("at", range(6))
def test_a_fault_at_any_moment_leaves_the_old_ones(
    at: int, error: BaseException, step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the n-th synchronisation or renaming."""
    write(tmp_path, 1)
    before, left = content(tmp_path), [at]
    fsync, rename = os.fsync, Path.rename

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise error
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(fsync))
        patch.setattr(Path, "rename", counted(rename))
        try:
            write(tmp_path, step, keep=1)
        except (OSError, KeyboardInterrupt) as caught:
            if isinstance(caught, OSError):
                assert str(tmp_path / f"checkpoint-{step}: it ") in str(caught) and "No space left" in str(caught)
        else:
            pytest.fail("it was not told")
    if at < 5 or step == 1:  # else it is the run's folder that could not be synced, with all in place
        assert content(tmp_path) == before
    assert latest_checkpoint(tmp_path) is not None
    write(tmp_path, 3, keep=1)
    assert names(tmp_path) == {"checkpoint-3"}


def test_a_limit_on_file_size_leaves_the_old_ones(tmp_path: Path) -> None:
    write(tmp_path, 1)
    before = content(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(
            OSError, match=r"checkpoint-2: it could not be written \(File too large\); what was there is as it was"
        ):
            write_checkpoint(tmp_path, 2, {"a": torch.zeros(10_000)}, {}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(tmp_path) == before and names(tmp_path) == {"checkpoint-1"}


def test_a_file_where_the_run_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(OSError, match=r"it could not be written|Not a directory"):
        write(tmp_path / "run", 1)
    assert (tmp_path / "run").read_text() == "x"


def test_only_what_the_dead_left_is_swept(tmp_path: Path) -> None:
    write(tmp_path, 1)
    mark = f"{atomic.machine()}-{dead()}-0af1"
    gone = {f"checkpoint-2.tmp-{mark}", f"checkpoint-1.old-{mark}", f"checkpoint-9.tmp-{atomic.machine()}-{os.getpid()}-0"}
    kept = {
        f"checkpoint-2.tmp-{atomic.machine()}-{os.getppid()}-0af1",
        f"checkpoint-2.tmp-00000000-{dead()}-0",
        f"mine.tmp-{mark}",
    }
    for name in gone | kept:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("x")
    write(tmp_path, 3)
    assert names(tmp_path) == kept | {"checkpoint-1", "checkpoint-3"}


def test_what_stood_aside_while_it_was_replaced_is_found_and_put_back(tmp_path: Path) -> None:
    write(tmp_path, 1)
    aside = write(tmp_path, 2).rename(tmp_path / f"checkpoint-2.old-{atomic.machine()}-{dead()}-0af1")
    assert latest_checkpoint(tmp_path) == aside and read_checkpoint(aside)[1] == {"step": 2}
    write(tmp_path, 3)
    assert names(tmp_path) == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}


_KILLED = """
import sys
from pathlib import Path
import torch
from support.sudden_death import die_at_each_moment
from loca_vision.storage.run_checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint

folder, over = Path(sys.argv[1]), sys.argv[2] == "over"
torch.set_num_threads(1)

def write(step):
    write_checkpoint(folder, step, {"a": torch.full((2_000,), float(step))}, {"step": step}, keep=1)

write(0)
last = orphans = 0
for moment in die_at_each_moment(lambda: write(last if over else last + 1)):
    tensors, state = read_checkpoint(latest_checkpoint(folder))
    assert state["step"] in (last, last + 1) and (tensors["a"] == state["step"]).all()
    last = state["step"]
    orphans += any("." in path.name for path in folder.iterdir())
write(10**6)
print(moment, orphans, [path.name for path in folder.iterdir()])
"""


@pytest.mark.parametrize("target", ["over", "next"])
def test_kill_nine_at_every_moment_leaves_a_whole_checkpoint(target: str, tmp_path: Path) -> None:
    """A process that writes over the last checkpoint, or the next one, dies before each of its calls on files in turn."""
    moments, orphans, left = run_script(_KILLED, tmp_path, target).split(maxsplit=2)
    assert int(moments) > 8 and int(orphans) > 5, (moments, orphans)
    assert left.strip() == "['checkpoint-1000000']"
