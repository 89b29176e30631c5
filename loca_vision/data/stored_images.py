"""Images as they are stored, in files or in rows of a table: read on access, sizes from headers alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

import torch
from PIL import Image

from loca_vision.data.image_headers import check_shape, named, size_of
from loca_vision.data.images import open_image
from loca_vision.data.sampling import stream_seed


class StoredImages(ABC):
    """RGB images, upright and of any size, by position.

    Raises:
        FileNotFoundError, ValueError: on access, an image does not exist, is broken, or would fill the memory; the error names
            it.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def opened(self, index: int) -> tuple[str, BinaryIO]:
        """Return an image's name for error messages, and the contents of its file, which the caller must close."""

    @abstractmethod
    def identity(self, index: int) -> str:
        """Return what identifies it without reading it: the name and size of its file."""

    @abstractmethod
    def part(self, positions: Sequence[int]) -> StoredImages:
        """Return the images at some positions."""

    def __getitem__(self, index: int) -> Image.Image:
        name, content = self.opened(index)
        with content:
            image = open_image(name, content)
        with named(name):
            check_shape(image.size)
        return image

    def size(self, index: int) -> tuple[int, int]:
        """Return (width, height) of an image without decoding its pixels."""
        name, content = self.opened(index)
        with content:
            return size_of(content, name)

    def digest(self) -> str:
        """Return a digest of the names and sizes of the files, in order."""
        return digest(self.identity(index) for index in range(len(self)))


class FolderImages(StoredImages):
    """Images in files below a folder."""

    def __init__(self, files: Sequence[Path], folder: Path) -> None:
        self.files, self.folder = tuple(files), folder

    def __len__(self) -> int:
        return len(self.files)

    def opened(self, index: int) -> tuple[str, BinaryIO]:
        with named(self.files[index]):
            return str(self.files[index]), self.files[index].open("rb")

    def identity(self, index: int) -> str:
        return file_identity(self.files[index], self.files[index].relative_to(self.folder).as_posix())

    def part(self, positions: Sequence[int]) -> FolderImages:
        return FolderImages([self.files[position] for position in positions], self.folder)


def file_identity(file: Path, name: str) -> str:
    return f"{name} {file.stat().st_size if file.is_file() else -1}"


def digest(texts: Iterable[str]) -> str:
    """Return 16 hexadecimal digits that tell whether texts, in order, are the same; names need not be UTF-8."""
    hashed = sha256()
    for text in texts:
        hashed.update(text.encode(errors="surrogateescape") + b"\0")
    return hashed.hexdigest()[:16]


def some_of(size: int, count: int | None, seed: int) -> list[int] | None:
    """Return `count` positions from 0 to size - 1 drawn by the seed; None, for all, if there are no more or with None."""
    if count is None or count >= size:
        return None
    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(stream_seed(seed))).tolist()
    return order[:count]
