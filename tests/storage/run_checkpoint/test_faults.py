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
import os, random, signal, sys, time
from pathlib import Path
import torch
from loca_vision.storage.run_checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint

folder, draw = Path(sys.argv[1]), random.Random(0)
torch.set_num_threads(1)

def write(step):
    write_checkpoint(folder, step, {"a": torch.full((200_000,), float(step))}, {"step": step}, keep=1)

write(0)
orphans = steps = 0
for attempt in range(50):
    last = read_checkpoint(latest_checkpoint(folder))[1]["step"]
    child = os.fork()
    if not child:
        while True:
            if attempt % 2:
                last += 1
            write(last)
    time.sleep(draw.uniform(0, 0.06))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    tensors, state = read_checkpoint(latest_checkpoint(folder))
    assert state["step"] >= last and (tensors["a"] == state["step"]).all()
    orphans += any("." in path.name for path in folder.iterdir())
write(10**6)
print(orphans, state["step"], [path.name for path in folder.iterdir()])
"""


def test_kill_nine_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    orphans, steps, left = done.stdout.split(maxsplit=2)
    assert int(orphans) > 5 and int(steps) > 5, "hardly an attempt hit a save"
    assert left.strip() == "['checkpoint-1000000']"
