"""The strict reader of safetensors files, and the atomic writer, under faults."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from loca_vision.storage import atomic_file as atomic
from loca_vision.storage import safetensors_file as safefile
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.safetensors_file import open_safetensors, write_safetensors
from loca_vision.storage.strict_json import MAX_HEADER, strict_json
from support.sudden_death import run_script
from support.time_limit import within

resource = pytest.importorskip("resource", reason="signals, modes and limits of POSIX")
ROOT = Path(__file__).parents[2]


def with_header(header: str | bytes, data: bytes = b"") -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read(path: Path) -> dict[str, torch.Tensor]:
    with open_safetensors(path) as opened:
        return opened.tensors()


def temporaries(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.endswith(".tmp")]


# JSON


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 1}',
        '[{"b": {"a": 1, "a": 2}}]',
        "NaN",
        "[-Infinity]",
        "1e999",
        "-1e999",
        "1" * 33,
        "0." + "1" * 40,
        "[" * 9 + "]" * 9,
        "[" * 10**6,
        '{"a":' * 10**5,
        "",
        "{} x",
        "{'a': 1}",
        "[1,]",
    ],
    ids=lambda text: text[:20],
)
def test_json_that_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        strict_json(text)


def test_json_that_is_read() -> None:
    value = {"a": [1, -2, 1.5e-300, 2**63 - 1, {"b": None, "c": True}], "": [[[[[[[]]]]]]]}
    assert strict_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    "header",
    [
        "{" + ",".join(f'"{i}":0' for i in range(500_000)) + ',"499999":0}',
        '{"a":{"dtype":"F32","data_offsets":[0,4],"shape":[' + ",".join([str(2**63 - 1)] * 400_000) + "]}}",
        '{"a":' + "9" * 8_000_000 + "}",
        '{"' + "a" * 8_000_000 + '":0}',
    ],
    ids=["repeated key at the end", "thousands of axes", "a long number", "a long name"],
)
def test_a_hostile_header_costs_seconds_and_one_short_line(header: str, tmp_path: Path) -> None:
    file = tmp_path / "hostile.safetensors"
    file.write_bytes(with_header(header, bytes(4)))
    assert len(header) < MAX_HEADER
    with within(20), pytest.raises(ValueError) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}: ") and len(str(caught.value)) < len(str(file)) + 700


# Reading


@pytest.mark.parametrize("length", [640, 1152, 1408, 65536 + 640, 640 + 3 * 2**16])
def test_a_header_whose_length_begins_like_a_pickle(length: int, tmp_path: Path) -> None:
    file = tmp_path / "good.safetensors"
    file.write_bytes(with_header(json.dumps({"a": entry()}).ljust(length), bytes(4)))
    assert torch.equal(read(file)["a"], torch.zeros(1))


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_is_named_and_not_run(protocol: int, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "run"),)

    file = tmp_path / "trap.safetensors"
    file.write_bytes(pickle.dumps([Trap(), "x" * 100], protocol))
    with pytest.raises(ValueError, match=r"trap\.safetensors: it is a pickle"):
        read(file)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", safefile._SIZES)
def test_every_dtype_it_knows_is_read_as_it_was_written(dtype: str, tmp_path: Path) -> None:
    torch_dtype = safetensors.torch._TYPES[dtype]
    wanted = {"b": torch.arange(6).reshape(2, 3).to(torch_dtype), "a": torch.ones(3).to(torch_dtype)}
    write_safetensors(tmp_path / "x.safetensors", wanted | {"none": torch.empty(0, 7), "one": torch.tensor(3.0)}, {"k": "v"})
    with open_safetensors(tmp_path / "x.safetensors") as opened:
        assert opened.metadata == {"k": "v"}
        assert opened.entries["b"].dtype == dtype and opened.entries["b"].shape == (2, 3)
        found = opened.tensors()
    assert set(found) == {"a", "b", "none", "one"}
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == torch_dtype for name in wanted)


@pytest.mark.parametrize("size", [1, 100_000])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_file_rewritten_between_check_and_reading(size: int, name: str, tmp_path: Path) -> None:
    """What is read is what was checked, or refused: never tensors of another name, dtype or shape."""
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"a": torch.ones(size)}, {})
    try:
        with open_safetensors(file) as opened:
            file.write_bytes(safetensors.torch.save({name: torch.ones(2 * size, dtype=torch.int16)}))
            found = opened.tensors()
    except ValueError as error:
        assert str(error).startswith(f"{file}: ")
    else:
        assert {key: (value.dtype, len(value)) for key, value in found.items()} == {"a": (torch.float32, size)}


def test_a_file_cut_between_check_and_reading(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"a": torch.ones(300_000)}, {})
    with pytest.raises(ValueError, match=r"x\.safetensors: "), open_safetensors(file) as opened:
        os.truncate(file, file.stat().st_size - 200)
        opened.tensors()


def test_what_is_wrong_is_said_in_one_printable_line(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(with_header(json.dumps({"a\n\x1b[2J\ud800": 0})))
    with pytest.raises(ValueError) as caught:
        read(file)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("broken", [False, True])
def test_a_huge_sparse_file_is_checked_without_being_read(broken: bool, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    size = 2**36
    file.write_bytes(with_header(json.dumps({"a": entry(shape=[size // 4], offsets=[0, size])})))
    os.truncate(file, file.stat().st_size + size + broken)
    if not broken:
        with open_safetensors(file) as opened:
            assert opened.entries["a"].shape == (size // 4,)
    else:
        with pytest.raises(ValueError, match="the tensors fill"), open_safetensors(file):
            pass


# Writing


def test_the_same_content_makes_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.safetensors" for i in range(5)]
    for file in files:
        write_safetensors(file, {name: torch.ones(3) for name in "dcba"}, {"one": "key"})
    assert len({file.read_bytes() for file in files}) == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_is_respected(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "x", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode


@pytest.mark.parametrize("there", [True, False], ids=["to a file", "to nothing yet"])
def test_symbolic_links_are_written_through(there: bool, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "target"
    if there:
        target.parent.mkdir()
        target.write_bytes(b"old")
    (tmp_path / "link").symlink_to(Path("elsewhere") / "target")
    (tmp_path / "link to link").symlink_to(tmp_path / "link")
    write_atomically(tmp_path / "link to link", b"new")
    assert (tmp_path / "link to link").is_symlink() and (tmp_path / "link").is_symlink()
    assert target.read_bytes() == b"new" and not target.is_symlink()
    assert temporaries(tmp_path) == temporaries(target.parent) == []


def test_what_is_no_regular_file_stays(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "circle").symlink_to("circle")
    before = {path.name: path.lstat().st_ino for path in tmp_path.iterdir()}
    for name in before:
        with (
            within(5),
            pytest.raises(OSError, match=rf"{name}: it could not be written \(something other than a regular"),
        ):
            write_atomically(tmp_path / name, b"new")
    assert {path.name: path.lstat().st_ino for path in tmp_path.iterdir()} == before


def test_nul_in_a_path_to_write(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a path holds no NUL character"):
        write_atomically(tmp_path / "a\0b", b"new")
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="it could not be written"):
        write_atomically(tmp_path / "file" / "x", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_permission_denied_is_one_clear_sentence(open_folder: Path) -> None:
    file = open_folder / "x.safetensors"
    file.write_bytes(b"old")
    open_folder.chmod(0o555)
    root = os.geteuid() == 0
    if root:  # whom no mode keeps out
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError) as caught:
            write_atomically(file, b"new")
    finally:
        if root:
            os.seteuid(0)
    assert str(caught.value) == f"{file}: it could not be written (Permission denied); what was there is as it was"
    assert file.read_bytes() == b"old" and temporaries(open_folder) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_limit_on_file_size_leaves_the_old_file(there: bool, tmp_path: Path) -> None:
    file = tmp_path / "x"
    if there:
        file.write_bytes(b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the closest to a full disk that needs no disk
    try:
        with pytest.raises(OSError, match=r"x: it could not be written \(File too large\)"):
            write_atomically(file, bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([("x", b"old")] if there else [])


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("owner", "function", "error"),
    [
        (os, "fsync", OSError(errno.ENOSPC, "No space left on device")),
        (os, "fsync", KeyboardInterrupt()),
        (Path, "replace", OSError(errno.EXDEV, "Invalid cross-device link")),
        (Path, "replace", KeyboardInterrupt()),
    ],
    ids=["disk full", "interrupt while syncing", "cannot rename", "interrupt while renaming"],
)
def test_a_fault_on_the_way_leaves_the_old_file_alone(
    owner: Any, function: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with monkeypatch.context() as patch, pytest.raises(type(error)) as caught:
        patch.setattr(owner, function, failing(error))
        write_atomically(tmp_path / "x", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"old")]
    if isinstance(error, OSError):
        assert str(tmp_path / "x") in str(caught.value) and str(error.strerror) in str(caught.value)


def test_file_and_folder_are_synced_around_the_renaming(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        about = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(about.st_mode) else f"file of {about.st_size} bytes")
        fsync(descriptor)

    def rename(self: Path, target: Path) -> Path:
        events.append("renaming")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    write_atomically(tmp_path / "x", b"12345")
    assert events == ["file of 5 bytes", "renaming", "folder"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_folder_that_cannot_be_synced(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, "told so")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    if code == errno.EIO:
        with pytest.raises(OSError, match=r"x: it is written, but might not outlive a power cut \(told so\)"):
            write_atomically(tmp_path / "x", b"new")
    else:  # some file systems have no such thing
        write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"


def test_two_threads_writing_to_one_path(tmp_path: Path) -> None:
    file, faults = tmp_path / "x", []
    contents = [bytes([i]) * 200_000 for i in range(2)]
    write_atomically(file, contents[0])

    def write(content: bytes) -> None:
        try:
            for _ in range(30):
                write_atomically(file, content)
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert file.read_bytes() in contents
    assert faults == [] and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_save_inside_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a signal's handler saves a checkpoint while the loop is saving one."""
    fsync, inner = os.fsync, [b"inner, and longer than the outer one"]

    def sync(descriptor: int) -> None:
        if inner:
            write_atomically(tmp_path / "x", inner.pop())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    write_atomically(tmp_path / "x", b"outer")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"outer")]


def test_a_link_laid_under_the_temporary_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "0")
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / f".x.{atomic.machine()}-{os.getpid()}-0.tmp").symlink_to("victim")
    monkeypatch.setattr(atomic, "_clean", lambda _: None)  # it comes after the cleaning
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious" and not (tmp_path / "x").exists()


def test_only_what_the_dead_left_of_this_file_is_cleaned(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = f".x.{atomic.machine()}-"
    gone = {f"{mine}{dead.pid}-0af1.tmp", f"{mine}{os.getpid()}-77.tmp"}  # the second: same id after a restart
    kept = {f"{mine}{os.getppid()}-0af1.tmp", f".x.00000000-{dead.pid}-0af1.tmp", f".y{mine[2:]}{dead.pid}-0af1.tmp"}
    kept |= {f"{mine}{dead.pid}-0af1.tmp.txt", f"{mine}{10**30}-0af1.tmp", "y.tmp"}
    for name in gone | kept:
        (tmp_path / name).write_bytes(b"half")
    write_atomically(tmp_path / "x", b"new")
    assert {path.name for path in tmp_path.iterdir()} == kept | {"x"}


def test_a_temporary_file_that_cannot_be_cleaned_does_not_stop_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = tmp_path / f".x.{atomic.machine()}-{dead.pid}-0.tmp"
    stale.mkdir()  # unlinking it is refused, as that of another user's file is
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new" and stale.exists()


_KILLED = """
import sys
from pathlib import Path
from support.sudden_death import die_at_each_moment
from loca_vision.storage.atomic_file import write_atomically

file = Path(sys.argv[1]) / "x.safetensors"
contents = [bytes([i]) * 3_000 for i in range(2)]
write_atomically(file, contents[0])
orphans = 0
for moment in die_at_each_moment(lambda: write_atomically(file, contents[1])):
    left = [path for path in file.parent.iterdir() if path != file]
    assert len(left) <= 1, left
    orphans += len(left)
    assert file.read_bytes() in contents
write_atomically(file, b"last")
print(moment, orphans, [path.name for path in file.parent.iterdir()], file.read_bytes())
"""


def test_kill_nine_while_saving_leaves_a_whole_file(tmp_path: Path) -> None:
    """A process that saves dies before each of its calls on files in turn."""
    moments, orphans, left = run_script(_KILLED, tmp_path).split(maxsplit=2)
    assert int(moments) > 1 and int(orphans) > 0, (moments, orphans)
    assert left.strip() == "['x.safetensors'] b'last'"


def test_a_reader_keeps_what_it_opened(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"a": torch.zeros(3)}, {})
    with open_safetensors(file) as opened:
        write_safetensors(file, {"b": torch.ones(9)}, {})
        assert torch.equal(opened.tensors()["a"], torch.zeros(3))
    assert set(read(file)) == {"b"}
