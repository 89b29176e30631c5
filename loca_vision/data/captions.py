"""Images with captions, for training a pipeline to generate images: from the hub, parquet files, or a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from loca_vision.checks import check_count
from loca_vision.data.caption_files import in_folder, without_row
from loca_vision.data.pair_sources import place_of
from loca_vision.data.rows import RowImages, check_column, load_rows, texts_of
from loca_vision.data.stored_images import StoredImages, digest, some_of


class Captioned(NamedTuple):
    """An RGB image, upright and of any size, and its caption."""

    image: Image.Image
    caption: str


class CaptionedImages(Dataset[Captioned]):
    """Images and captions by position; an image is decoded on access.

    Args:
        images: the images as they are stored.
        captions: one for each image.
        where: the data set, for error messages.
        names: the names of images and captions in digests: the names of columns, if there are any.
        notes: sentences about the parts of the source that are not read.

    Raises:
        ValueError: there is no image; or, on access, an image is broken or its long side is over 100 times its short one.
        FileNotFoundError: on access, the file of an image is gone.
    """

    def __init__(
        self,
        images: StoredImages,
        captions: Sequence[str],
        where: str,
        *,
        names: tuple[str, str] = ("image", "text"),
        notes: tuple[str, ...] = (),
    ) -> None:
        if not len(images):
            raise ValueError(f"{where}: expected images with captions, got none")
        self.images, self.captions, self.where = images, list(captions), where
        self.names, self.notes = names, notes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Captioned:
        return Captioned(self.images[index], self.captions[index])

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Return (width, height) in pixels of each image, upright, from its header: no pixels are decoded.

        Raises:
            FileNotFoundError, ValueError: as for accessing the images.
        """
        return [self.images.size(index) for index in range(len(self))]

    @cached_property
    def digests(self) -> dict[str, str]:
        """By column, or for "image" and "text": a digest of the names and sizes of files, or of the captions, in order."""
        return {self.names[0]: self.images.digest(), self.names[1]: digest(self.captions)}

    def some(self, count: int | None, seed: int) -> CaptionedImages:
        """Return `count` images drawn by the seed, or all of them if there are no more or `count` is None."""
        positions = some_of(len(self), count, seed)
        if positions is None:
            return self
        captions = [self.captions[position] for position in positions]
        return CaptionedImages(self.images.part(positions), captions, self.where, names=self.names, notes=self.notes)


def read_captioned(
    source: str | Path,
    *,
    image_column: str = "image",
    caption_column: str = "text",
    split: str = "train",
    cache_dir: Path | None = None,
    revision: str | None = None,
    config: str | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    caption: str | None = None,
) -> CaptionedImages:
    """Read the images and captions of one split. No code from the data set is run.

    Args:
        source: a folder of images with tables `metadata.jsonl` or `metadata.csv`, or with a .txt beside each image; a folder
            of parquet files, a parquet file, or the name of a data set on the hub. Tables take precedence over .txt files.
        image_column, caption_column: columns of tables and parquet files. If a caption is a list of texts, the first is used.
        split: in a folder of images, the folder of that name; if there are no such folders, all images are "train".
        cache_dir: where `datasets` keeps what it makes of the files; None for its default.
        revision: revision of a data set on the hub.
        config: the name of one of its configurations, if it has several.
        max_samples: at most this many, drawn by the seed.
        caption: a caption for all images; no others are looked for then, so a folder of images is enough.

    Raises:
        ModuleNotFoundError: the library `datasets`, which reads everything except images with .txt, is not installed.
        OSError: the data set is not available, or cannot be read.
        ValueError: it is not as described, an image has no caption, max_samples is not a number from 1 up, or as `place_of`.
    """
    if max_samples is not None:
        check_count("max_samples", max_samples)
    if caption is not None and not (isinstance(caption, str) and caption.strip()):
        raise ValueError(f"caption={caption!r}: expected a text")
    place = place_of(str(source), split, revision=revision, config=config)
    folder = Path(place[1]["data_dir"]) if place[0] == "imagefolder" else None
    found = in_folder(folder, split, caption) if folder else None
    if found:
        there = CaptionedImages(found.images, found.captions, str(source), notes=found.notes)
    else:
        rows = load_rows(source, place, split, cache_dir)
        there = _of_rows(rows, (image_column, caption_column), caption, f"{source} ({split})", folder)
    return there.some(max_samples, seed)


def _of_rows(rows: Any, columns: tuple[str, str], caption: str | None, where: str, folder: Path | None) -> CaptionedImages:
    """Return the images of rows, with a column of captions or one for all; `folder` contains the table, if it names files."""
    for option, column in zip(("image_column", "caption_column"), columns[: 1 if caption else 2], strict=False):
        check_column(rows, column, option, where)
    images = RowImages(rows, columns[0], where)
    notes = without_row(folder, images.paths) if folder else ()
    if caption is not None:
        return CaptionedImages(images, [caption] * len(images), where, names=(columns[0], "text"), notes=notes)
    captions = texts_of(rows, columns[1], where, lists=True)
    return CaptionedImages(images, captions, where, names=columns, notes=notes)
