"""Pairs of an image and its edited version, with the instruction: from the hub, a folder of images or parquet files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from loca_vision.checks import check_count
from loca_vision.data.pair_sources import place_of
from loca_vision.data.rows import RowImages, check_column, datasets_library, load_rows, texts_of
from loca_vision.data.stored_images import digest, some_of


class Pair(NamedTuple):
    """An RGB image and its edited version, both of any size, and the instruction."""

    original: Image.Image
    edited: Image.Image
    prompt: str


@dataclass(frozen=True)
class Columns:
    """The columns of a data set by their purpose; the defaults are those of diffusers' script."""

    original: str = "input_image"
    prompt: str = "edit_prompt"
    edited: str = "edited_image"


CARTOONIZATION = Columns(
    "original_image", "edit_prompt", "cartoonized_image"
)  # of instruction-tuning-sd, and of build_pairs.py
_OPTIONS = {"original": "original_image_column", "prompt": "edit_prompt_column", "edited": "edited_image_column"}


class Pairs(Dataset[Pair]):
    """Rows of a `datasets.Dataset` as pairs, decoded on access.

    Args:
        rows: the rows of one split.
        columns: the names of the columns.
        where: the data set, for error messages.

    Raises:
        ValueError: a column is missing or of another kind, a row has no image or text, or, on access, an image is broken.
    """

    def __init__(self, rows: Any, columns: Columns, where: str) -> None:
        self.rows, self.columns, self.where = rows, columns, where
        for field, name in vars(columns).items():
            check_column(rows, name, _OPTIONS[field], where)
        self.originals, self.edited = (RowImages(rows, name, where) for name in (columns.original, columns.edited))
        self.prompts = texts_of(rows, columns.prompt, where)  # the instruction of each row

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        return Pair(self.originals[index], self.edited[index], self.prompts[index])

    @cached_property
    def digests(self) -> dict[str, str]:
        """By column: a digest of the texts, or of the names and sizes of the image files, in order."""
        images = {one.column: one.digest() for one in (self.originals, self.edited)}
        return {self.columns.prompt: digest(self.prompts)} | images

    def some(self, count: int | None, seed: int) -> Pairs:
        """Return `count` pairs drawn by the seed, or all of them if there are no more or `count` is None."""
        positions = some_of(len(self), count, seed)
        return self if positions is None else Pairs(self.rows.select(positions), self.columns, self.where)


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
    """Read the pairs of one split. No code from the data set is run.

    Args:
        source: a folder of images with tables `metadata.jsonl` (what `datasets` calls an imagefolder), a folder of parquet
            files, a parquet file, or the name of a data set on the hub.
        split: the files of a folder without splits are all "train".
        cache_dir: where `datasets` keeps what it makes of the files; None for its default.
        revision: revision of a data set on the hub.
        config: the name of one of its configurations, if it has several.
        max_samples: at most this many, drawn by the seed.

    Raises:
        ModuleNotFoundError: the library `datasets` is not installed.
        OSError: the data set is not available, or cannot be read.
        ValueError: it is not as `Pairs` expects it, max_samples is not a number from 1 up, or as `place_of`.
    """
    if max_samples is not None:
        check_count("max_samples", max_samples)
    datasets_library()  # raises before the source is looked for
    place = place_of(str(source), split, revision=revision, config=config)
    rows = load_rows(source, place, split, cache_dir)
    return Pairs(rows, columns or Columns(), f"{source} ({split})").some(max_samples, seed)
