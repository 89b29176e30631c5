"""Pairs of an image and its edited version, with the instruction: from the hub, a folder of images or parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from loca_vision.checks import check_count
from loca_vision.data.images import as_rgb
from loca_vision.data.pair_sources import place_of
from loca_vision.data.sampling import stream_seed
from loca_vision.messages import nearest, one_line

MOST_STRETCHED = 100  # times that an image's long side may have its short one


class Pair(NamedTuple):
    """An RGB image, its edited version, both of any size, and what was asked for."""

    original: Image.Image
    edited: Image.Image
    prompt: str


@dataclass(frozen=True)
class Columns:
    """Which columns of a data set are what; by default as in diffusers' script."""

    original: str = "input_image"
    prompt: str = "edit_prompt"
    edited: str = "edited_image"


CARTOONIZATION = Columns(
    "original_image", "edit_prompt", "cartoonized_image"
)  # of instruction-tuning-sd, and of build_pairs.py


class Pairs(Dataset[Pair]):
    """Rows of a `datasets.Dataset` as pairs, decoded when they are asked for.

    Args:
        rows: of one split.
        columns: their names.
        where: the data set, for messages.

    Raises:
        ValueError: a column is missing or of another kind, or a row has no image or text; and at an image that is broken.
    """

    def __init__(self, rows: Any, columns: Columns, where: str) -> None:
        self.columns, self.where = columns, where
        for option, name in vars(columns).items():
            _check_column(rows, name, option, where)
        for name in (columns.original, columns.edited):
            rows = _as_images(rows, name, where)
        if getattr(rows.features[columns.prompt], "dtype", None) not in ("string", "large_string"):
            raise ValueError(f"{where}: the column {columns.prompt} holds {_kind(rows, columns.prompt)}, not texts")
        self.rows = rows.select_columns(list(dict.fromkeys(vars(columns).values())))  # one may be original and edited
        for index, prompt in enumerate(self.rows.select_columns([columns.prompt])[columns.prompt]):
            if not isinstance(prompt, str) or not prompt.strip():
                raise ValueError(f"{where}, row {index}: there is no text in {columns.prompt}")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        try:
            row = self.rows[index]
            original, edited = (self._image(row[name], index, name) for name in (self.columns.original, self.columns.edited))
        except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{self.where}, row {index}{self._broken(index)}: it cannot be read as an image") from error
        return Pair(original, edited, row[self.columns.prompt])

    def _broken(self, index: int) -> str:
        """Which image of a row cannot be read: its column and, where there is one, its file."""
        for column in (self.columns.original, self.columns.edited):
            try:
                self.rows.select_columns([column])[index]
            except Exception:  # whatever a decoder raises
                file = (self._stored(column)[index][column] or {}).get("path")
                return f", {column}" + (f" ({Path(file).name})" if file else "")
        return ""

    def _stored(self, column: str) -> Any:
        """The rows with the files of a column as they are stored, not decoded."""
        return self.rows.select_columns([column]).cast_column(column, _datasets().Image(decode=False))

    @property
    def prompts(self) -> list[str]:
        """The instruction of each row."""
        return list(self.rows.select_columns([self.columns.prompt])[self.columns.prompt])

    @cached_property
    def digests(self) -> dict[str, str]:
        """By column: a digest of the texts, or of the names and sizes of the image files, in their order."""
        images = dict.fromkeys((self.columns.original, self.columns.edited))
        return {self.columns.prompt: _digest(self.prompts)} | {
            column: _digest(_file_of(row[column]) for row in self._stored(column)) for column in images
        }

    def _image(self, image: Image.Image | None, index: int, column: str) -> Image.Image:
        if image is None:
            raise ValueError(f"{self.where}, row {index}: there is no image in {column}")
        try:
            long, short = max(image.size), min(image.size)
            if long > MOST_STRETCHED * short:  # brought to hundreds of pixels on the short side it would fill the memory
                raise ValueError(f"{image.width} x {image.height} pixels: one side is over {MOST_STRETCHED} times the other")
            return as_rgb(image)
        except ValueError as error:
            raise ValueError(f"{self.where}, row {index}, {column}: {error}") from None

    def some(self, count: int | None, seed: int) -> Pairs:
        """`count` random pairs by the seed; all of them if there are no more, or with None."""
        if count is None or count >= len(self):
            return self
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(stream_seed(seed)))
        return Pairs(self.rows.select(order[:count].tolist()), self.columns, self.where)


def read_pairs(
    source: str | Path,
    *,
    columns: Columns | None = None,
    split: str = "train",
    cache_dir: Path | None = None,
    revision: str | None = None,
    config: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> Pairs:
    """The pairs of one split. No code of the data set's is run.

    Args:
        source: a folder of images with tables `metadata.jsonl` (what `datasets` calls an imagefolder), a folder of parquet
            files, a parquet file, or the name of a data set on the hub.
        split: the files of a folder without splits are all "train".
        cache_dir: of what `datasets` makes of the files; None for its usual one.
        revision: of a data set on the hub.
        config: the name of one of its configurations, where it has several.
        max_samples: at most this many, drawn by the seed.

    Raises:
        ModuleNotFoundError: the library `datasets` is not installed.
        OSError: the data set cannot be had, or cannot be read.
        ValueError: it is not as `Pairs` expects it, max_samples is not a number from 1 up, or as `place_of`.
    """
    if max_samples is not None:
        check_count("max_samples", max_samples)
    library = _datasets()
    place = place_of(str(source), split, revision=revision, config=config)
    try:
        rows = library.load_dataset(place[0], **place[1], split=split, cache_dir=str(cache_dir) if cache_dir else None)
    except Exception as error:  # its errors are of many kinds, and so are those of what it reads with
        raise OSError(f"{source}: {split!r} cannot be read as a data set ({one_line(error)})") from error
    return Pairs(rows, columns or Columns(), f"{source} ({split})").some(max_samples, seed)


def _digest(texts: Iterable[str]) -> str:
    digest = sha256()
    for text in texts:
        digest.update(text.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def _file_of(stored: Mapping[str, Any] | None) -> str:
    """Name and size of an image that is stored as a path or as bytes."""
    path, content = Path((stored or {}).get("path") or ""), (stored or {}).get("bytes")
    if content is None:
        return f"{path.name} {path.stat().st_size if path.is_file() else -1}"
    return f"{path.name} {len(content)}"


def _datasets() -> ModuleType:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the library datasets is missing: python -m pip install 'loca-vision[train]'", name=error.name
        ) from error
    library: ModuleType = datasets
    return library


def _check_column(rows: Any, name: str, option: str, where: str) -> None:
    if name not in rows.column_names:
        there = ", ".join(rows.column_names)
        flag = {"original": "original_image_column", "prompt": "edit_prompt_column", "edited": "edited_image_column"}[option]
        raise ValueError(f"{flag}={name!r}: {where} has no such column, only {there}{nearest(name, rows.column_names)}")


def _as_images(rows: Any, name: str, where: str) -> Any:
    """The rows with that column as images, also where the file does not say that its bytes are some."""
    library, kind = _datasets(), rows.features[name]
    if isinstance(kind, library.Image):
        return rows
    named = set(kind) if isinstance(kind, dict) else set()
    if "bytes" in named or getattr(kind, "dtype", None) in ("binary", "large_binary"):
        return rows.cast_column(name, library.Image())
    raise ValueError(f"{where}: the column {name} holds {_kind(rows, name)}, not images")


def _kind(rows: Any, name: str) -> str:
    kind = rows.features[name]
    return str(getattr(kind, "dtype", type(kind).__name__))
