"""Files written whole or not at all, to stay."""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Temporary files that this process is writing now. A restarted container has the process id of the one that was killed.
_writing: set[str] = set()


def write_atomically(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write so that a crash, at any moment, leaves the old file or the new one, and the new one stays.

    The umask is respected, and a symbolic link is written through. What a killed process left behind is cleaned.
    The content may come piece by piece; what goes wrong in making it passes through, and the old file stays.

    Raises:
        ValueError: a path with a NUL character.
        OSError: it could not be written; what was there is as it was.
    """
    refuse_nul(path)
    try:
        target = _target(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        _replace(target, data)
    except OSError as error:
        raise type(error)(f"{path}: it could not be written ({error.strerror}); what was there is as it was") from error
    try:
        _sync_folder(target.parent)
    except OSError as error:
        raise type(error)(f"{path}: it is written, but might not outlive a power cut ({error.strerror})") from error


def _target(path: Path) -> Path:
    """The regular file, there or not, that `path` means at the end of all links."""
    target = Path(os.path.realpath(path))  # `resolve` has another error for a circle of links in every Python
    if os.path.lexists(target) and not target.is_file():  # a device would be exchanged for a file
        raise OSError(errno.EINVAL, "what is there is no regular file")
    return target


def _temporary_prefix(target: Path) -> str:
    """Names the machine too: the process ids of another, on a shared disk, say nothing here."""
    return f".{target.name}.{zlib.crc32(platform.node().encode()):08x}-"


def _temporary(target: Path) -> Path:
    return target.with_name(f"{_temporary_prefix(target)}{os.getpid()}-{secrets.token_hex(4)}.tmp")


def _replace(target: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    temporary = _temporary(target)
    _writing.add(temporary.name)
    try:
        with temporary.open("xb") as file:  # x: never through a link that someone else has laid
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        _writing.discard(temporary.name)


def _clean(target: Path, remove: Callable[[Path], object] = lambda file: file.unlink(missing_ok=True)) -> None:
    """Remove the temporary files (or, by another `remove`, folders) of processes that are no more."""
    pattern = re.compile(re.escape(_temporary_prefix(target)) + r"(\d+)-[0-9a-f]+\.tmp")
    with suppress(OSError):  # a folder closed to reading, a file of another user
        for left in target.parent.iterdir():
            owner = pattern.fullmatch(left.name)
            if owner and left.name not in _writing and not _alive(int(owner[1])):
                remove(left)


def _alive(process: int) -> bool:
    """Whether another process of that number runs."""
    if process == os.getpid():
        return False
    if os.name != "posix":  # elsewhere signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


@contextmanager
def folder_atomically(path: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """An empty folder to fill, which stands at `path` once the block has ended without an error: whole, or not at all.

    Args:
        overwrite: take the place of a folder that is there.
        ours: whether a file of that folder is one that may go; if one may not, nothing is replaced.

    Raises:
        FileExistsError: something is there that may not be replaced.
        OSError: it could not be written; what was there is as it was.
    """
    refuse_nul(path)
    target = Path(os.path.realpath(path))
    _check_replaceable(path, target, overwrite=overwrite, ours=ours)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target, lambda folder: shutil.rmtree(folder, ignore_errors=True))
    temporary = _temporary(target)
    _writing.add(temporary.name)
    try:
        temporary.mkdir()
        yield temporary
        _sync_folder(temporary)
        _check_replaceable(path, target, overwrite=overwrite, ours=ours)
        _exchange(temporary, target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _writing.discard(temporary.name)


def _check_replaceable(path: Path, target: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise FileExistsError(f"{path}: a file is there, where a folder is to be written")
    there = sorted(target.iterdir())
    if there and not overwrite:
        raise FileExistsError(f"{path}: that folder is not empty; choose another, or say that it may be overwritten")
    for file in there:
        if not file.is_file() or not ours(file):
            raise FileExistsError(f"{path}: {file.name} is there, which was not written here; it is not overwritten")


def _exchange(temporary: Path, target: Path) -> None:
    """Put a folder in the place of another. A crash between the two renamings leaves the old one beside, under its name
    with a dot before and `.old` behind."""
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    if target.is_dir():
        target.rename(old)
    try:
        temporary.rename(target)
    except BaseException:
        if old.is_dir():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):  # not to be had in this folder
            raise


def refuse_nul(path: Path) -> None:
    """
    Raises:
        ValueError: a path with a NUL character.
    """
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r}: a path holds no NUL character")
