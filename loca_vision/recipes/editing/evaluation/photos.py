"""The photographs of an evaluation, from a folder or from the pairs of a data set, each with its own seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from loca_vision.data.pairs import Pair, Pairs
from loca_vision.data.photographs import photographs_in
from loca_vision.data.sampling import stream_seed
from loca_vision.recipes.editing.edit import read_photograph, square, squares


@dataclass(frozen=True)
class EditCase:
    """A photograph and the edit that is requested.

    Args:
        content: SHA-256 of the file, or of the pair's pixels and text, in hexadecimal digits.
        label: a name for people.
        prompt: the instruction.
        seed: the seed of its noise, the same for all editors: a function of the evaluation's seed and the content.
        read: returns the photograph and, if there is one, the target: RGB, squares of the evaluation's resolution.
    """

    content: str
    label: str
    prompt: str
    seed: int
    read: Callable[[], tuple[Image.Image, Image.Image | None]]

    @property
    def name(self) -> str:
        """16 hexadecimal digits."""
        return self.content[:16]


def from_folder(folder: Path, prompt: str, *, resolution: int, seed: int, most: int | None = None) -> list[EditCase]:
    """Return the photographs of a folder and its subfolders, each content once, and of these the first `most` by content.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    photographs = photographs_in(folder)[:most]
    return [
        EditCase(
            photograph.content,
            str(photograph.file.relative_to(folder)),
            prompt,
            stream_seed(seed, int(photograph.content, 16)),
            partial(_alone, photograph.file, resolution),
        )
        for photograph in photographs
    ]


def from_pairs(pairs: Pairs, prompt: str | None = None, *, resolution: int, seed: int) -> list[EditCase]:
    """Return the pairs of a data set, each content once, with their own instructions or one for all.

    Raises:
        ValueError: one of the images cannot be read.
    """
    contents: dict[str, tuple[int, str]] = {}
    for index in tqdm(range(len(pairs)), desc="reading pairs", dynamic_ncols=True, disable=None):
        pair = pairs[index]
        contents.setdefault(_content(pair), (index, pair.prompt))
    return [
        EditCase(
            content,
            prompt or own,
            prompt or own,
            stream_seed(seed, int(content, 16)),
            partial(_paired, pairs, index, resolution),
        )
        for content, (index, own) in contents.items()
    ]


def _alone(file: Path, resolution: int) -> tuple[Image.Image, None]:
    return square(read_photograph(file), resolution), None


def _paired(pairs: Pairs, index: int, resolution: int) -> tuple[Image.Image, Image.Image]:
    return squares(pairs[index], resolution)


def _content(pair: Pair) -> str:
    digest = sha256(pair.prompt.encode())
    for image in (pair.original, pair.edited):
        digest.update(f" {image.size} ".encode() + image.tobytes())
    return digest.hexdigest()
