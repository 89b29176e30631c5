"""List the image files and other files below a folder; hidden folders and the output of runs are never read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# PIL opens these formats, but only as stubs, or by starting another program.
_NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_ENDINGS = Image.registered_extensions()  # this makes PIL load all its formats
FORMATS = tuple(name for name in Image.OPEN if name not in _NOT_IMAGES)
"""The formats that PIL reads without another program, by PIL's names."""
IMAGE_ENDINGS = frozenset(ending for ending, format_name in _ENDINGS.items() if format_name in FORMATS)
"""The endings of the formats that PIL reads, in lower case and with the dot."""
_OF_SYSTEMS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
_OF_RUNS = ("metrics.json", "evaluation.json", "config.yaml")


@dataclass(frozen=True)
class Listing:
    """The contents of a folder and all folders in it, in the order of their paths.

    Args:
        images: files with the ending of an image format that PIL reads.
        others: all other files.
        left_out: ignored files and folders: hidden ones, those of operating systems, and the output of runs.
    """

    images: tuple[Path, ...]
    others: tuple[Path, ...]
    left_out: tuple[Path, ...]


def list_images(folder: Path) -> Listing:
    """List everything below a folder, at any depth; links to folders are followed, and each folder is visited once."""
    images: list[Path] = []
    others: list[Path] = []
    left_out: list[Path] = []
    visited: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        status = current.stat()
        if (status.st_dev, status.st_ino) in visited:
            continue
        visited.add((status.st_dev, status.st_ino))
        for entry in current.iterdir():
            if is_left_out(entry):
                left_out.append(entry)
            elif entry.is_dir():
                waiting.append(entry)
            else:
                (images if is_image(entry) else others).append(entry)
    return Listing(*(tuple(sorted(paths, key=lambda path: path.parts)) for paths in (images, others, left_out)))


def is_image(path: Path) -> bool:
    """Return whether it is a file with the ending of an image format that PIL reads."""
    return path.suffix.lower() in IMAGE_ENDINGS and path.is_file()


def is_left_out(path: Path) -> bool:
    """Return whether to ignore a path: a hidden name, a folder of an operating system, or the output of a run."""
    name = path.name.lower()
    if name.startswith(".") or name in _OF_SYSTEMS:
        return True
    return path.is_dir() and any((path / file).is_file() for file in _OF_RUNS)


def folders_in(folder: Path) -> list[Path]:
    """Return the folders directly in a folder that are not ignored, in the order of their names."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_left_out(entry))


def relative_names(paths: Iterator[Path] | tuple[Path, ...], root: Path, most: int = 5) -> str:
    """Return the first of some paths below a root, for a sentence; names that are not UTF-8 are written with escapes."""
    names = [os.fsencode(path.relative_to(root)).decode(errors="backslashreplace") for path in paths]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
