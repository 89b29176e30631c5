"""Read the first and last locations of a LoCA adapter's components from its file alone; the seed determines the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loca_vision.formats.adapter_file import read_description
from loca_vision.formats.packed.reading import open_adapter
from loca_vision.methods.loca import LoCAConfig
from loca_vision.methods.spectrum import random_spectrum

Cells = NDArray[np.int64]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Moves:
    """The components of one projection.

    Args:
        name: the name of the projection, such as blocks.6.attn.q.
        shape: the shape (p, q) of its weight.
        start: (B, 2), rows and columns at the start.
        end: (B, 2), rows and columns at the end.
        coefficients: (B,), the amplitudes.
    """

    name: str
    shape: tuple[int, int]
    start: Cells
    end: Cells
    coefficients: Array

    @property
    def distance(self) -> Cells:
        """(B,), the distance in cells between start and end: the larger of rows and columns."""
        return np.asarray(np.abs(self.end - self.start).max(1))

    @property
    def at_border(self) -> NDArray[np.bool_]:
        """(B,), whether a component has moved to the first or last row or column, where it may have been stopped."""
        border = (self.end == 0) | (self.end == np.array(self.shape) - 1)
        return np.asarray((border & (self.end != self.start)).any(1))


def read_moves(file: Path) -> list[Moves]:
    """Return the moves of every projection, in the order of the model's blocks.

    Raises:
        ValueError: the file is not a LoCA adapter of a single model, or its locations were not initialised uniformly.
        OSError: the file cannot be read.
    """
    with open_adapter(file) as opened:
        about = read_description(opened.metadata, opened.entries)
        tensors = opened.tensors()
    config = about.configs.get("")
    if not isinstance(config, LoCAConfig) or config.location_init != "uniform":
        raise ValueError(f"{file}: expected an adapter of LoCA whose locations began uniformly")
    return [_moves(name, shape, tensors, config) for name, shape in about.shapes.items()]


def _moves(name: str, shape: tuple[int, int], tensors: Any, config: LoCAConfig) -> Moves:
    flat = tensors[f"{name}.locations"].long().numpy()
    start = random_spectrum(shape, len(flat), name=name, seed=config.seed).cells.numpy()
    end = np.stack(np.divmod(flat, shape[1]), 1)
    return Moves(name, shape, start, end, tensors[f"{name}.coefficients"].double().numpy())


def travelled(runs: Sequence[Sequence[Moves]]) -> dict[str, Any]:
    """Summarise the moves in runs of several seeds: the share of components in a new cell by run, and distances in cells.

    Distances cover all components of all runs, including those that did not move.
    """
    distances = [np.concatenate([moves.distance for moves in run]) for run in runs]
    together = np.concatenate(distances)
    stopped = np.concatenate([moves.at_border for run in runs for moves in run])
    return {
        "moved": [round(float((one > 0).mean()), 4) for one in distances],
        "mean_distance": round(float(together.mean()), 3),
        "median_distance": float(np.median(together)),
        "largest_distance": int(together.max()),
        "stopped_at_border": round(float(stopped.mean()), 4),
    }
