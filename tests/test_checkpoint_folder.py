"""Checkpoints of a run under faults: whole or not there, and the folder never without a whole one."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import within

from loca_vision.storage import atomic_file as atomic
from loca_vision.storage import atomic_folder
from loca_vision.storage.run_checkpoint import latest_checkpoint, read_checkpoint, write_checkpoint
from loca_vision.storage.run_manifest import make_manifest

resource = pytest.importorskip("resource", reason="signals, modes and limits of POSIX")
ROOT = Path(__file__).parents[1]
FILES = ("state.safetensors", "state.json", "manifest.json")


def write(folder: Path, step: int, keep: int | None = None) -> Path:
    return write_checkpoint(folder, step, {"a": torch.full((50,), float(step))}, {"step": step}, keep=keep)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dead() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def forge(path: Path, **changed: bytes) -> None:
    """A manifest that is right about files that are wrong."""
    for name, data in changed.items():
        (path / name.replace("__", ".")).write_bytes(data)
    files = {name: (path / name).read_bytes() for name in FILES[:2]}
    (path / "manifest.json").write_bytes(make_manifest(1, files))


# There and back


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    bits = torch.randint(-(2**63), 2**63 - 1, (6, 8))
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.int8, torch.uint8)
    tensors = {str(kind): bits.view(kind) for kind in kinds} | {"truth": bits > 0, "whole": bits}
    tensors |= {"one": torch.tensor(3), "none": torch.empty(0, 7), "turned": bits.T, "part": bits[2:4, ::2], "same": bits}
    tensors |= {"parameter": torch.nn.Parameter(torch.randn(2)), "spread": torch.zeros(1).expand(3)}
    found, _ = read_checkpoint(write_checkpoint(tmp_path, 1, tensors, {}))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        as_bytes = [t.detach().contiguous().flatten().view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*as_bytes)


def test_state_comes_back_unchanged(tmp_path: Path) -> None:
    draw = random.Random(0)
    floats = [draw.gauss(0, 1) * 10.0 ** draw.randrange(-300, 300) for _ in range(200)]
    state = {
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, *floats],
        "whole": [0, -1, 2**63, -(2**128), 10**3000],
        "texts": ["", "é😀", "\x00\n\u2028", "\udc80"],
        "other": [None, True, False, {}, [], {"": {"a": [[[[[[[[[1]]]]]]]]]}}],
    }  # fmt: skip
    _, found = read_checkpoint(write_checkpoint(tmp_path, 1, {}, state))
    assert found == state and repr(found) == repr(state)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"step": -1}, "step=-1: a step is a whole number"),
        ({"step": True}, "step=True"),
        ({"step": 1.0}, "step=1.0"),
        ({"step": 10**18}, "below 10"),
        ({"keep": 0}, "keep=0: a number of checkpoints"),
        ({"keep": True}, "keep=True"),
        ({"state": {"a": (1, 2)}}, "state: it would come back changed"),
        ({"state": {1: 2}}, "state: it would come back changed"),
        ({"state": {"a": float("nan")}}, "state: it cannot be kept as JSON"),
        ({"state": {"a": 10**5000}}, "state: it cannot be kept as JSON"),
        ({"state": {"a": torch.zeros(1)}}, "state: it cannot be kept as JSON"),
        ({"state": [1]}, "it is not a table"),
        ({"tensors": {"a": [1]}}, "'a': it is list, not a dense tensor"),
        ({"tensors": {"a": torch.eye(2).to_sparse()}}, "not a dense tensor"),
        ({"tensors": {"a": torch.zeros(1, dtype=torch.complex64)}}, "'a': torch.complex64"),
        ({"tensors": {"a": torch.zeros([1] * 9)}}, "9 axes cannot be"),
        ({"tensors": {"__metadata__": torch.zeros(1)}}, "a tensor's name is a text other"),
        ({"tensors": {1: torch.zeros(1)}}, "1: a tensor's name"),
        ({"tensors": {"a" * 9_000_000: torch.zeros(1)}}, "more than the 8388608 bytes"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_back_is_refused_first(arguments: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write(tmp_path, 0)
    before = content(tmp_path)
    wanted: dict[str, Any] = {"step": 0, "tensors": {}, "state": {}} | arguments
    with pytest.raises((ValueError, TypeError), match=sentence):
        write_checkpoint(tmp_path, wanted.pop("step"), wanted.pop("tensors"), wanted.pop("state"), **wanted)
    assert content(tmp_path) == before


# Which one is the latest


def test_the_latest_is_the_one_of_the_largest_step(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None and latest_checkpoint(tmp_path / "none") is None
    for step in (9, 100, 20):
        write(tmp_path, step)
    (tmp_path / "checkpoint-0999").mkdir()
    (tmp_path / "checkpoint-1000.txt").write_text("")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


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
        with pytest.raises(OSError, match=r"checkpoint-2: it could not be written \(what is there is no folder\)"):
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


# Rotation


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


# Faults while writing


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


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
