"""Captions of the images in a folder: a .txt file of the same name beside each, or one caption for all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from loca_vision.data.image_files import folders_in, list_images, relative_names
from loca_vision.data.stored_images import FolderImages

_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
THREE_WAYS = (
    "expected a table metadata.jsonl with a file_name and a text in each line, a .txt with the caption beside each image, or "
    "one caption for all images"
)


class InFolder(NamedTuple):
    """Images with their captions, and sentences about files that are not read."""

    images: FolderImages
    captions: list[str]
    notes: tuple[str, ...]


def in_folder(folder: Path, split: str, caption: str | None) -> InFolder | None:
    """Return the images of a folder that need no table; None if there is a table and no caption for all.

    Args:
        split: a folder in `folder`; if there is none, all images are "train".
        caption: a caption for all images, whatever other captions there are.

    Raises:
        ValueError: an image has no caption, or there is no such split.
    """
    whole = list_images(folder)
    if caption is None and any(file.name in _TABLES for file in whole.others):
        return None
    part = _part(folder, split)
    listing = whole if part == folder else list_images(part)
    beside = {_beside(image) for image in listing.images} if caption is None else set()
    others = [file for file in listing.others if file not in beside]
    strays = [file for file in others if _has_captions(file)]
    captions = [caption] * len(listing.images) if caption else _captions(listing.images, folder, strays)
    unread = "files of captions, since one is given for all" if caption else ".txt files without an image"
    notes = (
        *_note("images outside of the split", [image for image in whole.images if part not in image.parents], folder),
        *_note(unread, strays, folder),
        *_note("files that are not images", [file for file in others if not _has_captions(file)], folder),
        *_note("hidden, of the system or of a run", listing.left_out, folder),
    )
    return InFolder(FolderImages(listing.images, folder), captions, notes)


def without_row(folder: Path, read: Iterable[Path]) -> tuple[str, ...]:
    """Return notes about a folder whose table was read: the images it does not name, and the .txt files that are ignored."""
    known, listing = {os.path.realpath(path) for path in read}, list_images(folder)
    images = [image for image in listing.images if os.path.realpath(image) not in known]
    texts = [text for text in (_beside(image) for image in listing.images) if text.is_file()]
    return (
        *_note("images that the table of the split does not name", images, folder),
        *_note(".txt files beside images, since there is a table", sorted(set(texts)), folder),
    )


def _part(folder: Path, split: str) -> Path:
    part = next((entry for entry in folders_in(folder) if entry.name == split), None)
    if part and list_images(part).images:
        return part
    if split != "train":
        raise ValueError(f"split={split!r}: expected a folder {split}/ with images in {folder}, got none")
    return folder


def _captions(images: Sequence[Path], folder: Path, strays: Sequence[Path]) -> list[str]:
    """Return the text beside each image.

    Raises:
        ValueError: some images have none; the error says how many, and names the first of them.
    """
    texts = {image: _text(_beside(image)) for image in images}
    missing = [image for image, text in texts.items() if text is None]
    more = f"; there are .txt files without an image: {relative_names(tuple(strays), folder)}" if strays else ""
    if len(missing) == len(images):
        raise ValueError(f"{folder}: {THREE_WAYS}, got images alone{more}")
    faults = {
        "no .txt beside": missing,
        "an empty .txt beside": [image for image, text in texts.items() if text == ""],
        "a .txt that is not UTF-8 beside": [image for image, text in texts.items() if isinstance(text, UnicodeDecodeError)],
    }
    found = [f"{what} {len(at)} ({relative_names(tuple(at), folder)})" for what, at in faults.items() if at]
    if found:
        raise ValueError(f"{folder}: expected a caption for each of {len(images)} images, got {' and '.join(found)}{more}")
    return [str(text) for text in texts.values()]


def _text(file: Path) -> str | UnicodeDecodeError | None:
    """Return the stripped text of a file, None if there is no such file, or the error if it cannot be decoded."""
    if not file.is_file():
        return None
    try:
        return file.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return error


def _has_captions(file: Path) -> bool:
    return file.suffix == ".txt" or file.name in _TABLES


def _beside(image: Path) -> Path:
    return image.with_suffix(".txt")


def _note(what: str, files: Sequence[Path], folder: Path) -> list[str]:
    return [f"not read, {what}: {relative_names(tuple(files), folder)}"] if files else []
