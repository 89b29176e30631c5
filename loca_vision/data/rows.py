"""Rows of a `datasets.Dataset`: how they are read, which columns hold images and texts, and the images as they are stored."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO
from zipfile import ZipFile

from loca_vision.data.image_headers import named
from loca_vision.data.stored_images import StoredImages, file_identity
from loca_vision.messages import nearest, one_line


def datasets_library() -> ModuleType:
    """Import the library `datasets`.

    Raises:
        ModuleNotFoundError: the library `datasets` is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the library datasets is missing: python -m pip install 'loca-vision[train]'", name=error.name
        ) from error
    library: ModuleType = datasets
    return library


def load_rows(source: object, place: tuple[str, dict[str, Any]], split: str, cache_dir: Path | None) -> Any:
    """Load the rows of one split. No code from the data set is run.

    Args:
        source: the source, for error messages.
        place: the result of `place_of`.
        cache_dir: where `datasets` keeps what it makes of the files; None for its default.

    Raises:
        ModuleNotFoundError: the library `datasets` is not installed.
        OSError: the data set is not available, or cannot be read.
    """
    library = datasets_library()
    try:
        return library.load_dataset(place[0], **place[1], split=split, cache_dir=str(cache_dir) if cache_dir else None)
    except Exception as error:  # it raises errors of many kinds, as do the libraries it reads with
        raise OSError(f"{source}: {split!r} cannot be read as a data set ({one_line(error)})") from error


class RowImages(StoredImages):
    """The images in a column of rows, even if the file does not declare its bytes as images.

    Args:
        where: the data set, for error messages.

    Raises:
        ValueError: the column holds something else.
    """

    def __init__(self, rows: Any, column: str, where: str) -> None:
        library = datasets_library()
        if not _is_image(rows.features[column], library):
            raise ValueError(f"{where}: the column {column} holds {_kind(rows, column)}, not images")
        self.rows = rows.select_columns([column]).cast_column(column, library.Image(decode=False))
        self.column, self.where = column, where

    def __len__(self) -> int:
        return len(self.rows)

    def opened(self, index: int) -> tuple[str, BinaryIO]:
        stored = self._stored(index)
        path, content = stored.get("path"), stored.get("bytes")
        if content is None and not path:
            raise ValueError(f"{self.where}, row {index}: there is no image in {self.column}")
        name = f"{self.where}, row {index}, {self.column}" + (f" ({Path(path).name})" if path else "")
        with named(name):
            return name, _open(str(path)) if content is None else BytesIO(content)

    def identity(self, index: int) -> str:
        stored = self._stored(index)
        path, content = Path(stored.get("path") or ""), stored.get("bytes")
        return file_identity(path, path.name) if content is None else f"{path.name} {len(content)}"

    def part(self, positions: Sequence[int]) -> RowImages:
        return RowImages(self.rows.select(positions), self.column, self.where)

    @property
    def paths(self) -> list[Path]:
        """The local files that rows name."""
        stored = (self._stored(index) for index in range(len(self)))
        return [Path(row["path"]) for row in stored if row.get("path") and row.get("bytes") is None]

    def _stored(self, index: int) -> dict[str, Any]:
        """Return the path of the file, its bytes, or both; nothing for a row without an image."""
        return self.rows[index][self.column] or {}


def texts_of(rows: Any, column: str, where: str, *, lists: bool = False) -> list[str]:
    """Return the text in each row.

    Args:
        where: the data set, for error messages.
        lists: also accept a column of lists of texts, of which the first is used.

    Raises:
        ValueError: the column holds something else, or a row has no text.
    """
    kind = rows.features[column]
    one = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)
    are_lists = lists and _is_text(one)
    if not are_lists and not _is_text(kind):
        raise ValueError(f"{where}: the column {column} holds {_kind(rows, column)}, not texts")
    values = list(rows.select_columns([column])[column])
    texts = [(value or [None])[0] for value in values] if are_lists else values
    for index, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{where}, row {index}: there is no text in {column}")
    return texts


def check_column(rows: Any, name: str, option: str, where: str) -> None:
    """Check that a column exists.

    Args:
        option: the option that names the column, for the error message.

    Raises:
        ValueError: there is no such column.
    """
    if name not in rows.column_names:
        there = ", ".join(rows.column_names)
        raise ValueError(f"{option}={name!r}: {where} has no such column, only {there}{nearest(name, rows.column_names)}")


def _open(path: str) -> BinaryIO:
    """Open the file at a local path, or in a local archive as `datasets` writes it: zip://NAME::ARCHIVE."""
    inside, *archives = path.split("::")
    if "://" not in path:
        if not Path(path).is_file():  # do not wait for a writer at the other end of a pipe either
            raise FileNotFoundError(path)
        return Path(path).open("rb")
    if not inside.startswith("zip://") or len(archives) != 1 or "://" in archives[0]:
        raise ValueError(f"expected the image itself or its file on this machine, got the address {path!r}")
    with ZipFile(archives[0]) as archive:
        return BytesIO(archive.read(inside.removeprefix("zip://")))


def _is_image(kind: Any, library: ModuleType) -> bool:
    named_fields = set(kind) if isinstance(kind, dict) else set()
    binary = getattr(kind, "dtype", None) in ("binary", "large_binary")
    return isinstance(kind, library.Image) or "bytes" in named_fields or binary


def _is_text(kind: Any) -> bool:
    return getattr(kind, "dtype", None) in ("string", "large_string")


def _kind(rows: Any, name: str) -> str:
    kind = rows.features[name]
    return str(getattr(kind, "dtype", type(kind).__name__))
