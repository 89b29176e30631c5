"""The image files below a folder, what else lies there, and what is never read: hidden folders and the output of runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

# PIL opens these formats, but only as stubs, or by starting another program.
_NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
_ENDINGS = Image.registered_extensions()  # which makes PIL load all its formats
FORMATS = tuple(name for name in Image.OPEN if name not in _NOT_IMAGES)
"""The formats that PIL reads by itself, by its names for them."""
IMAGE_ENDINGS = frozenset(ending for ending, format_name in _ENDINGS.items() if format_name in FORMATS)
"""The endings of the formats that PIL reads, in small letters and with the dot."""
_OF_SYSTEMS = {"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"}
_OF_RUNS = ("metrics.json", "evaluation.json", "config.yaml")


@dataclass(frozen=True)
class Listing:
    """What lies below a folder, each in the order of its path.

    Args:
        images: files whose ending is that of an image format that PIL reads.
        others: all other files.
        left_out: files and folders that are not looked at: hidden ones, those of operating systems, the output of runs.
    """

    images: tuple[Path, ...]
    others: tuple[Path, ...]
    left_out: tuple[Path, ...]


def list_images(folder: Path) -> Listing:
    """Everything below a folder, at any depth; links to folders are followed, each folder is visited once."""
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
    """Whether it is a file whose ending is that of an image format that PIL reads."""
    return path.suffix.lower() in IMAGE_ENDINGS and path.is_file()


def is_left_out(path: Path) -> bool:
    """Whether no image is looked for there: a hidden name, a folder of an operating system, or the output of a run."""
    name = path.name.lower()
    if name.startswith(".") or name in _OF_SYSTEMS:
        return True
    return path.is_dir() and any((path / file).is_file() for file in _OF_RUNS)


def folders_in(folder: Path) -> list[Path]:
    """The folders directly in a folder that are looked at, in the order of their names."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not is_left_out(entry))


def relative_names(paths: Iterator[Path] | tuple[Path, ...], root: Path, most: int = 5) -> str:
    """The first of some paths below a root, for a sentence; a name that is not UTF-8 is written with escapes."""
    names = [os.fsencode(path.relative_to(root)).decode(errors="backslashreplace") for path in paths]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
