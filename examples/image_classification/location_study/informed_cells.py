"""A second method for this study: cosines over reordered rows and columns, additional directions, and cells that relocate."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from loca_vision import AdapterConfig, Projection, Update, kind
from loca_vision.dct import dct2, idct2
from loca_vision.methods.sparse_config import SparseConfig
from loca_vision.storage.safetensors_file import open_safetensors

FIRST_SHARE = 0.3  # the share of components that relocate, before its cosine decay begins; Evci et al. 2020


class InformedCells(Update):
    """The update P^T (C^T S D) Q + L M R^T, where S has B trained coefficients, P and Q are permutations, M (k, k) is trained.

    If `every` is above 0, components relocate as in RigL (Evci et al., ICML 2020): every `every` steps, the components with the
    smallest coefficients move to the empty cells where the spectrum of the gradient, summed over these steps, is largest, and
    start there at zero. The share that moves falls from 0.3 to 0 along a cosine until step `until`. Adam's moments are not
    reset. A step is counted for each gradient that arrives, so there must be one gradient per step.

    Attributes:
        coefficients: (B,) float32 parameter.
        core: M, (k, k) float32 parameter.
        cells: (B,) int64, row * q + column of S.
        rows, columns: (p,), (q,) int64: the position of each row and column of the update in the order of the transform.
        left, right: (p, k), (q, k) float32, orthonormal columns.
    """

    cells: Tensor
    rows: Tensor
    columns: Tensor
    left: Tensor
    right: Tensor
    steps: Tensor
    seen: Tensor

    def __init__(self, shape: tuple[int, int], count: int, directions: int, scale: float, every: int, until: int) -> None:
        super().__init__(shape, scale)
        self.every, self.until = every, until
        self.coefficients = nn.Parameter(torch.zeros(count))
        self.core = nn.Parameter(torch.zeros(directions, directions))
        self.register_buffer("cells", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("rows", torch.arange(shape[0]))
        self.register_buffer("columns", torch.arange(shape[1]))
        self.register_buffer("left", torch.zeros(shape[0], directions))
        self.register_buffer("right", torch.zeros(shape[1], directions))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        # Saved in files as well, so that a run resumed from a checkpoint relocates by the same gradients.
        self.register_buffer("seen", torch.zeros(shape if every else (0, 0)))

    def delta(self, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        moves = bool(self.every) and self.training and torch.is_grad_enabled()
        if moves:
            self._move_on()
        spectrum = self.coefficients.new_zeros(self.shape[0] * self.shape[1]).index_add(0, self.cells, self.coefficients)
        cosines = idct2(spectrum.view(self.shape))
        if moves:
            cosines.register_hook(self._see)  # type: ignore[no-untyped-call]
        update = cosines[self.rows][:, self.columns]
        if self.core.numel():
            update = update + self.left @ self.core @ self.right.T
        return self.scale * strength * update

    @torch.no_grad()
    def _see(self, gradient: Tensor) -> None:
        self.seen += dct2(gradient)
        self.steps += 1

    @torch.no_grad()
    def _move_on(self) -> None:
        step = int(self.steps)
        if step == 0 or step % self.every or step > self.until or not self.seen.any():
            return
        share = FIRST_SHARE / 2 * (1 + math.cos(math.pi * step / self.until))
        moved = self.coefficients.abs().argsort()[: round(share * len(self.cells))]
        score = self.seen.abs().flatten()
        score[self.cells] = -1.0
        self.cells[moved] = score.topk(len(moved)).indices
        self.coefficients[moved] = 0.0
        self.seen.zero_()


@kind
@dataclass(frozen=True)
class InformedCellsConfig(AdapterConfig):
    """The settings of an adapter of `InformedCells`.

    Args:
        n_components: the number of components B.
        directions: the number of directions k.
        relocate_every, relocate_until: `every` and `until` in steps; 0 keeps the cells where they are.
        folder, rule: a new adapter is read from `<folder>/<rule>/seed-<seed>.safetensors`. This file contains the flat cells of
            each projection under its name, and optionally `<name>.rows`, `.columns`, `.left` and `.right`. The file of a
            trained adapter does not depend on it.
    """

    method: ClassVar[str] = "informed-cells"
    title: ClassVar[str] = "cosines at informed cells"
    summary: ClassVar[str] = "cosines, orders and directions in a file"
    lr: ClassVar[float] = SparseConfig.lr

    n_components: int = 1
    directions: int = 0
    relocate_every: int = 0
    relocate_until: int = 0
    scale: float = 1.0
    targets: tuple[str, ...] = ("q", "v")
    seed: int = 0
    layers: str | tuple[str, ...] | None = None
    folder: str = ""
    rule: str = ""

    def build(self, shape: tuple[int, int]) -> InformedCells:
        return InformedCells(shape, self.n_components, self.directions, self.scale, self.relocate_every, self.relocate_until)

    def initialize(self, update: InformedCells, projection: Projection, generator: Generator) -> None:
        name = projection.name
        with open_safetensors(Path(self.folder) / self.rule / f"seed-{self.seed}.safetensors") as opened:
            held = opened.tensors()
        if name not in held:
            raise ValueError(f"rule={self.rule!r}: it has no cells for {name}")
        update.cells.copy_(held[name])
        for part in ("rows", "columns", "left", "right"):
            if f"{name}.{part}" in held:
                getattr(update, part).copy_(held[f"{name}.{part}"])

    def for_updates(self, updates: Mapping[str, Update]) -> AdapterConfig:
        return replace(self, folder="", rule="")
