"""Files that are written durably: whole or not at all."""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

Content = bytes | Iterable[bytes | memoryview]  # of a file: at once, or piece by piece

# The marks of what this process is writing now. A restarted container has the process id of the one that was killed.
_writing: set[str] = set()


def write_atomically(path: Path, data: Content) -> None:
    """Write so that a crash, at any moment, leaves the old file or the new one, and the new one stays.

    The umask is respected, and a symbolic link is written through. What a killed process left behind is cleaned.
    What goes wrong in making the content, where it comes piece by piece, passes through, and the old file stays.

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
        sync_folder(target.parent)
    except OSError as error:
        raise type(error)(f"{path}: it is written, but might not outlive a power cut ({error.strerror})") from error


def _target(path: Path) -> Path:
    """The regular file, there or not, that `path` means at the end of all links."""
    target = Path(os.path.realpath(path))  # `resolve` has another error for a circle of links in every Python
    if os.path.lexists(target) and not target.is_file():  # a device would be exchanged for a file
        raise OSError(errno.EINVAL, "something other than a regular file is there")
    return target


@contextmanager
def writing_mark() -> Iterator[str]:
    """A part of a temporary name that no other writer has, and that tells later whether its writer still runs."""
    mark = f"{machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    _writing.add(mark)
    try:
        yield mark
    finally:
        _writing.discard(mark)


def machine() -> str:
    """Eight hexadecimal digits: the process ids of another machine, on a shared disk, say nothing here."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def abandoned(mark: str) -> bool:
    """Whether the process that left the mark has ended; False where it cannot be known, and for what is not a mark."""
    owner = re.fullmatch(rf"{machine()}-([0-9]+)-[0-9a-f]+", mark)
    return owner is not None and mark not in _writing and not _alive(int(owner[1]))


def _replace(target: Path, data: Content) -> None:
    with writing_mark() as mark:
        temporary = target.with_name(f".{target.name}.{mark}.tmp")
        try:
            write_synced(temporary, data)
            temporary.replace(target)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_synced(path: Path, data: Content) -> None:
    """Write a file that is not there yet, and wait until it lies on the disk."""
    with path.open("xb") as file:  # x: never through a link that someone else has laid
        file.writelines([data] if isinstance(data, bytes) else data)
        file.flush()
        os.fsync(file.fileno())


def _clean(target: Path) -> None:
    """Remove the temporary files of processes that have ended."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"(.+)\.tmp")
    with suppress(OSError):  # a folder closed to reading, a file of another user
        for left in target.parent.iterdir():
            name = pattern.fullmatch(left.name)
            if name and abandoned(name[1]):
                left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether another process of that number runs."""
    if process == os.getpid():
        return False
    if os.name != "posix":  # elsewhere signal 0 is not a question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, if the system offers that."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):  # not available in this folder
            raise


def refuse_nul(path: Path) -> None:
    """
    Raises:
        ValueError: a path with a NUL character.
    """
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r}: a path holds no NUL character")
