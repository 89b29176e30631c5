"""Updates of weight matrices between two safetensors files, one at a time."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loca_vision.storage.safetensors_file import OpenFile, open_safetensors

Array = NDArray[np.float64]
SMALLEST_SIDE = 16
PARTS = ("q", "k", "v")


@dataclass(frozen=True)
class Place:
    """Where an update lies: a tensor, and which rows of it."""

    name: str
    tensor: str
    rows: tuple[int, int]
    cols: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.cols

    @property
    def kind(self) -> str:
        """The last part of the name, as in q or fc1."""
        return self.name.rpartition(".")[2]


class WeightUpdates:
    """The matrices that two files share, as updates: trained - base, in float64."""

    def __init__(self, base: Path, trained: Path, layers: Sequence[str], stack: ExitStack) -> None:
        """
        Args:
            layers: patterns of tensor names; any of them is enough.
            stack: closes the files.

        Raises:
            OSError: a file cannot be read.
            ValueError: a file is no safetensors file, or they share no matrix of at least 16 x 16 with such a name.
        """
        self.paths = base, trained
        self.files: tuple[OpenFile, OpenFile] = tuple(stack.enter_context(open_safetensors(path)) for path in self.paths)  # type: ignore[assignment]
        shared = sorted(self._shared(layers), key=_in_order)
        self.places = {place.name: place for tensor in shared for place in self._places(tensor)}
        if not self.places:
            raise ValueError(
                f"{base} and {trained}: they share no matrix of at least {SMALLEST_SIDE} x {SMALLEST_SIDE} whose name fits "
                f"{', '.join(layers)}"
            )

    def update(self, name: str) -> Array:
        """
        Raises:
            ValueError: the matrix holds numbers that are not finite, or was not changed.
        """
        place = self.places[name]
        rows = slice(*place.rows)
        before, after = (file.tensor(place.tensor)[rows].double().numpy() for file in self.files)
        update = after - before
        if not np.isfinite(update).all():
            raise ValueError(f"{name}: it has entries that are not finite")
        if update.std() == 0:
            raise ValueError(f"{name}: both files have the same weights; leave it out with --layers")
        return np.asarray(update)

    def digests(self) -> dict[str, str]:
        """The beginning of each file's SHA-256."""
        return {role: _digest(path) for role, path in zip(("base", "trained"), self.paths, strict=True)}

    def _shared(self, layers: Sequence[str]) -> list[str]:
        before, after = (file.entries for file in self.files)
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
        """The tensor; of a fused qkv its three parts."""
        rows, cols = self.files[0].entries[tensor].shape
        name = tensor.removesuffix(".weight")
        stem, _, kind = name.rpartition(".")
        if kind != "qkv" or rows != 3 * cols:
            return [Place(name, tensor, (0, rows), cols)]
        return [Place(f"{stem}.{part}", tensor, (i * cols, (i + 1) * cols), cols) for i, part in enumerate(PARTS)]


def _in_order(name: str) -> list[tuple[int, str]]:
    """As a key for sorting: block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()[:16]
