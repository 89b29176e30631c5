"""A method for this study: cosine coefficients at fixed cells that are read from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from loca_vision import AdapterConfig, Projection, Update, kind
from loca_vision.methods.locations import cell_locations
from loca_vision.methods.sparse_config import SparseConfig, fixed
from loca_vision.methods.spectrum import Spectrum
from loca_vision.storage.safetensors_file import open_safetensors


@kind
@dataclass(frozen=True)
class ChosenCellsConfig(SparseConfig):
    """The settings of an adapter whose cells are read from a file.

    Args:
        folder: the folder of the files.
        rule: a new adapter is read from `<folder>/<rule>/seed-<seed>.safetensors`. This file contains the flat cells (B,) of
            each projection under the projection's name. The file of a trained adapter does not depend on it.
    """

    method: ClassVar[str] = "chosen-cells"
    title: ClassVar[str] = "cosines at chosen cells"
    summary: ClassVar[str] = "cosine coefficients at the cells in a file"

    n_components: int | Mapping[str, int] = 1
    scale: float = 1.0
    targets: tuple[str, ...] = ("q", "v")
    seed: int = 0
    layers: str | Sequence[str] | None = None
    folder: str = ""
    rule: str = ""

    def _cells(self) -> dict[str, Tensor]:
        with open_safetensors(Path(self.folder) / self.rule / f"seed-{self.seed}.safetensors") as opened:
            return opened.tensors()

    def spectrum(self, shape: tuple[int, int], coefficients: Tensor, locations: Tensor) -> Spectrum:
        return fixed(Spectrum(shape, coefficients, locations, scale=self.scale))

    def components(self, names: list[str]) -> dict[str, int]:
        cells = self._cells()
        for name in names:
            if name not in cells:
                raise ValueError(f"rule={self.rule!r}: it has no cells for {name}")
        return {name: len(cells[name]) for name in names}

    def first_locations(self, projection: Projection, count: int, generator: torch.Generator) -> Tensor:
        return cell_locations(self._cells()[projection.name], projection.shape)

    def for_updates(self, updates: Mapping[str, Update]) -> AdapterConfig:
        counts = {name: update.count for name, update in updates.items() if isinstance(update, Spectrum)}
        return replace(self, n_components=counts, folder="", rule="")
