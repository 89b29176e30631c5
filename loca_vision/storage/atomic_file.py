"""Write files durably: completely or not at all."""

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

Content = bytes | Iterable[bytes | memoryview]  # the content of a file, at once or piece by piece

# The marks of what this process is writing now; needed because a restarted container has the process id of the killed one.
_writing: set[str] = set()


def write_atomically(path: Path, data: Content) -> None:
    """Write a file durably, such that a crash at any moment leaves either the old file or the new one.

    The umask is respected, and a symbolic link is followed. Temporary files that killed processes left behind are removed. If
    the content comes piece by piece and producing it fails, that error is passed on and the old file stays.

    Args:
        path: the file to write; missing parent folders are created.
        data: the content.

    Raises:
        ValueError: the path contains a NUL character.
        OSError: the file could not be written, in which case the old one is unchanged; or it was written, but might be lost in
            a power cut.
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
    """Return the regular file, existing or not, that `path` refers to after following all links."""
    target = Path(os.path.realpath(path))  # `resolve` raises a different error for a cycle of links in every Python version
    if os.path.lexists(target) and not target.is_file():  # otherwise a device would be replaced by a file
        raise OSError(errno.EINVAL, "something other than a regular file is there")
    return target


@contextmanager
def writing_mark() -> Iterator[str]:
    """Yield a unique part for a temporary name, which later shows whether its writer is still running."""
    mark = f"{machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    _writing.add(mark)
    try:
        yield mark
    finally:
        _writing.discard(mark)


def machine() -> str:
    """Return eight hexadecimal digits for this machine; process ids of another machine, on a shared disk, mean nothing here."""
    return f"{zlib.crc32(platform.node().encode()):08x}"


def abandoned(mark: str) -> bool:
    """Whether the process that left the mark has ended; False if this is unknown or `mark` is not a mark."""
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
    """Write a file that does not exist yet, and wait until it is on the disk."""
    with path.open("xb") as file:  # x: never through a link that someone else has put there
        file.writelines([data] if isinstance(data, bytes) else data)
        file.flush()
        os.fsync(file.fileno())


def _clean(target: Path) -> None:
    """Remove the temporary files of processes that have ended."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"(.+)\.tmp")
    with suppress(OSError):  # the folder may be unreadable, or a file may belong to another user
        for left in target.parent.iterdir():
            name = pattern.fullmatch(left.name)
            if name and abandoned(name[1]):
                left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    """Whether another process with this id is running."""
    if process == os.getpid():
        return False
    if os.name != "posix":  # on other systems, signal 0 is not a mere query
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, if the system supports that."""
    if os.name != "posix":  # on other systems, a folder cannot be opened
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOTSUP):  # these mean that this folder does not support it
            raise


def refuse_nul(path: Path) -> None:
    """Refuse a path that contains a NUL character.

    Raises:
        ValueError: the path contains a NUL character.
    """
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r}: a path holds no NUL character")
