"""Updates of weight matrices between two safetensors files, one at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loca_vision.storage.safetensors_file import Entry, open_safetensors

Array = NDArray[np.float64]
SMALLEST_SIDE = 16
PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Place:
    """The location of an update: a tensor and a range of its rows."""

    name: str
    tensor: str
    rows: tuple[int, int]
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.cols

    @property
    def kind(self) -> str:
        """The last part of the name, such as q or fc1."""
        return self.name.rpartition(".")[2]


class WeightUpdates:
    """The matrices that two files share, as updates: trained - base, in float64."""

    def __init__(self, base: Path, trained: Path, layers: Sequence[str]) -> None:
        """Find the matrices that the files share.

        Args:
            base: the file of the weights before training.
            trained: the file of the weights after training.
            layers: patterns of tensor names; matching any one is enough.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is not a safetensors file, or the files share no matrix of at least 16 x 16 with a matching name.
        """
        self.paths = base, trained
        self.entries = [_entries(path) for path in self.paths]
        shared = sorted(self._shared(layers), key=_in_order)
        self.places = {place.name: place for tensor in shared for place in self._places(tensor)}
        if not self.places:
            raise ValueError(
                f"{base} and {trained}: they share no matrix of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} whose name fits "
                f"{', '.join(layers)}"
            )

    def update(self, name: str) -> Array:
        """Return an update in float64.

        Raises:
            ValueError: the update has entries that are not finite.
        """
        place = self.places[name]
        rows = slice(*place.rows)
        before, after = (_tensor(path, place.tensor)[rows] for path in self.paths)
        update = after - before
        if not np.isfinite(update).all():
            raise ValueError(f"{name}: it has entries that are not finite")
        return np.asarray(update)

    def changed(self) -> list[str]:
        """Return the names of the matrices that training has changed; unchanged matrices have no statistics.

        Raises:
            ValueError: an update has entries that are not finite, or no matrix was changed.
        """
        names = [name for name in self.places if self.update(name).std() > 0]
        if not names:
            raise ValueError(f"{self.paths[0]} and {self.paths[1]}: all matrices that they share are the same")
        return names

    def digests(self) -> dict[str, str]:
        """Return the first 16 hexadecimal digits of each file's SHA-256."""
        return {role: _digest(path) for role, path in zip(("base", "trained"), self.paths, strict=True)}

    def _shared(self, layers: Sequence[str]) -> list[str]:
        before, after = self.entries
        return [
            name
            for name, entry in before.items()
            if name in after
            and entry.shape == after[name].shape
            and len(entry.shape) == 2
            and min(entry.shape) >= SMALLEST_SIDE
            and any(fnmatchcase(name, pattern) for pattern in layers)
        ]

    def _places(self, tensor: str) -> list[Place]:
        """Return the place of a tensor, or the three places in a fused qkv."""
        rows, cols = self.entries[0][tensor].shape
        name = tensor.removesuffix(".weight")
        stem, _, kind = name.rpartition(".")
        if kind != "qkv" or rows != 3 * cols:
            return [Place(name, tensor, (0, rows), cols)]
        return [Place(f"{stem}.{part}", tensor, (i * cols, (i + 1) * cols), cols) for i, part in enumerate(PARTS)]


def _entries(path: Path) -> dict[str, Entry]:
    with open_safetensors(path) as file:
        return file.entries


def _tensor(path: Path, name: str) -> Array:
    with open_safetensors(path) as file:
        return np.asarray(file.tensor(name).double())


def _in_order(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()[:16]
