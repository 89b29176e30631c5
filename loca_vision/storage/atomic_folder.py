"""Write folders durably, completely or not at all: create them under another name, sync them, and rename them.

A rename cannot replace an existing folder. So the folder to be replaced is called `NAME.old-MARK` for a moment, and `put_back`
restores its name if the writer dies in that moment. A folder that is being written or removed is called `NAME.tmp-MARK`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from loca_vision.storage.atomic_file import Content, abandoned, refuse_nul, sync_folder, write_synced, writing_mark

ASIDE = re.compile(r"(?P<name>.+)\.(?P<kind>tmp|old)-(?P<mark>[0-9a-f]{8}-[0-9]+-[0-9a-f]+)")


def write_folder(target: Path, files: Mapping[str, Content]) -> None:
    """Write a folder of files durably, such that a crash at any moment leaves either the old folder or the new one.

    Only one process at a time may write to a target; others may read.

    Args:
        target: the folder to write; missing parent folders are created.
        files: the content of each file by name.

    Raises:
        ValueError: the path contains a NUL character.
        OSError: the folder could not be written, in which case the old one is unchanged; or it was written, but might be lost
            in a power cut.
    """
    refuse_nul(target)
    with writing_mark() as mark:
        aside = target.with_name(f"{target.name}.old-{mark}")
        try:
            if os.path.lexists(target) and (target.is_symlink() or not target.is_dir()):
                raise OSError(errno.ENOTDIR, "something other than a folder is there")
            target.parent.mkdir(parents=True, exist_ok=True)
            _make(target.with_name(f"{target.name}.tmp-{mark}"), target, aside, files)
        except OSError as error:
            why = error.strerror or error
            raise type(error)(f"{target}: it could not be written ({why}); what was there is as it was") from error
        try:
            sync_folder(target.parent)
        except OSError as error:
            raise type(error)(f"{target}: it is written, but might not outlive a power cut ({error.strerror})") from error
        with suppress(OSError):  # `sweep` will remove it later
            shutil.rmtree(aside)


def _make(temporary: Path, target: Path, aside: Path, files: Mapping[str, Content]) -> None:
    try:
        temporary.mkdir()
        for name, data in files.items():
            write_synced(temporary / name, data)
        sync_folder(temporary)
        if target.exists():
            target.rename(aside)
        temporary.rename(target)
    except BaseException:  # also for an interrupt, which may come between the two renames
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise


def check_replaceable(target: Path, *, overwrite: bool, ours: Callable[[Path], bool]) -> None:
    """Raise if `write_folder` would delete anything that it must not.

    Args:
        target: the folder to be written.
        overwrite: whether an existing folder may be replaced if `ours` holds for all files in it.
        ours: whether a file in the folder may be deleted.

    Raises:
        ValueError: the path contains a NUL character.
        FileExistsError: something exists there that must not be replaced.
    """
    refuse_nul(target)
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        raise FileExistsError(f"{target}: something other than a folder is there")
    there = sorted(target.iterdir())
    if there and not overwrite:
        raise FileExistsError(f"{target}: that folder is not empty; choose another, or say that it may be overwritten")
    for file in there:
        if not file.is_file() or not ours(file):
            raise FileExistsError(f"{target}: {file.name} is there, which was not written here; it is not overwritten")


def remove_folder(folder: Path) -> None:
    """Remove a folder such that a partly removed one is never seen under its name.

    Raises:
        OSError: the folder could not be removed.
    """
    with writing_mark() as mark:
        doomed = folder.with_name(f"{folder.name}.tmp-{mark}")
        folder.rename(doomed)
        shutil.rmtree(doomed)


def put_back(parent: Path, names: re.Pattern[str]) -> None:
    """Restore the names of folders that a writer was replacing when it died, if these names match `names`."""
    for folder, target, kind in _left(parent, names):
        if kind == "old" and not os.path.lexists(target):
            with suppress(OSError):
                folder.rename(target)


def sweep(parent: Path, names: re.Pattern[str]) -> None:
    """Remove the unfinished and the replaced folders that dead writers left behind, if their names match `names`."""
    for folder, target, kind in _left(parent, names):
        if kind == "tmp" or target.exists():
            shutil.rmtree(folder, ignore_errors=True)


def _left(parent: Path, names: re.Pattern[str]) -> Iterator[tuple[Path, Path, str]]:
    """Yield what dead writers left behind: the folder, the path it was meant for, and "tmp" or "old"."""
    with suppress(FileNotFoundError):
        for folder in list(parent.iterdir()):
            match = ASIDE.fullmatch(folder.name)
            if match and names.fullmatch(match["name"]) and abandoned(match["mark"]) and not folder.is_symlink():
                yield folder, folder.with_name(match["name"]), match["kind"]
