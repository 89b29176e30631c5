"""Spectral-encoded LoRA: each low-rank factor is the inverse transform of a sparse spectrum (SeLoRA, arXiv 2506.16787)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from loca_vision.checks import check_choice, check_count, check_factor, check_flag, check_share
from loca_vision.functional.cosine_atoms import Cells
from loca_vision.functional.fourier import inverse_real
from loca_vision.functional.haar import inverse_haar2
from loca_vision.methods.adapter_config import AdapterConfig, Projection, TensorSpec, generator_of
from loca_vision.methods.locations import distinct
from loca_vision.methods.lora import LowRank, check_product, check_rank, editing_rank, start_magnitude
from loca_vision.methods.registry import kind
from loca_vision.methods.update import Update
from loca_vision.offload import stored


class SpectralLowRank(LowRank):
    """B = T(F_B) of shape (p, r) and A = T(F_A) of shape (r, q), for sparse real spectra F and an orthonormal T.

    T is the inverse 2-D Haar transform, or the real part of the inverse 2-D FFT.

    Attributes:
        up_coefficients, down_coefficients: (n,) float32 parameters, the non-zero entries of F_B and F_A.
        up_cells, down_cells: (n,) int64 buffers, the cells of these entries as row * columns + column.
    """

    up_cells: Tensor
    down_cells: Tensor

    def __init__(
        self, shape: tuple[int, int], rank: int, counts: tuple[int, int], scale: float, *, basis: str, weight_decomposed: bool
    ) -> None:
        super().__init__(shape, scale, weight_decomposed=weight_decomposed)
        self.rank, self.basis = rank, basis
        self.up_coefficients = nn.Parameter(torch.zeros(counts[0], dtype=torch.float32))
        self.down_coefficients = nn.Parameter(torch.zeros(counts[1], dtype=torch.float32))
        self.register_buffer("up_cells", torch.zeros(counts[0], dtype=torch.int64))
        self.register_buffer("down_cells", torch.zeros(counts[1], dtype=torch.int64))

    def pair(self) -> tuple[Tensor, Tensor]:
        (rows, cols), rank = self.shape, self.rank
        return (
            _inverse(self.up_coefficients, self.up_cells, (rows, rank), self.basis),
            _inverse(self.down_coefficients, self.down_cells, (rank, cols), self.basis),
        )


def _inverse(values: Tensor, cells: Tensor, shape: tuple[int, int], basis: str) -> Tensor:
    rows, cols = shape
    if basis == "fft":
        return inverse_real(values, Cells(torch.stack([cells // cols, cells % cols], 1), shape), norm="ortho")
    return inverse_haar2(values.new_zeros(rows * cols).index_add(0, cells, values).view(shape))


def _energy(cells: Tensor, shape: tuple[int, int], basis: str) -> float:
    """Return the sum of the squared norms of the atoms at these cells."""
    if basis == "haar":
        return float(len(cells))
    (rows, cols), row, col = shape, cells // shape[1], cells % shape[1]
    own_mirror = ((2 * row) % rows == 0) & ((2 * col) % cols == 0)
    return float(0.5 * len(cells) + 0.5 * own_mirror.sum())


@kind
@dataclass(frozen=True)
class SeLoRAConfig(AdapterConfig):
    """The settings of SeLoRA: W' = W0 + (alpha / r) B A, where both factors are transforms of sparse spectra; or with DoRA.

    Each factor has exactly floor((1 - eta) r d) trained numbers, where d is p for B and q for A. Their cells are drawn at
    random, once for all factors of one shape. B starts at zero, and A starts with the same variance as in LoRA.

    A file holds `<projection>.up_coefficients`, `.down_coefficients`, for DoRA also `.magnitude`, and
    `cells.<rows>x<columns>` (int32) once for each shape of a factor.

    Args:
        r: the rank, that is, the number of columns of B and of rows of A.
        eta: the share of each factor's spectrum that is zero, from 0 up to but not including 1; 0.2 to 0.6 in the paper.
        basis: "haar" or "fft".
        alpha: as in LoRA.
        targets: which projections to adapt, as in `AdapterConfig`.
        use_dora: learn the magnitude of each row separately from its direction.
        seed: the seed for the cells and for A's initial spectrum.
        layers: name patterns of the layers to adapt, as in `AdapterConfig`; None: all.

    Raises:
        ValueError: a field is invalid; the message names the field, its value and the rule.
    """

    method: ClassVar[str] = "selora"
    title: ClassVar[str] = "SeLoRA"
    summary: ClassVar[str] = "factors of low rank with sparse spectra"
    lr: ClassVar[float] = 5e-3  # LoRA's, as the paper gives no learning rate
    lr_grid: ClassVar[tuple[float, ...]] = (5e-4, 1.5e-3, 5e-3)

    r: int = 16
    eta: float = 0.5
    basis: Literal["haar", "fft"] = "haar"
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")
    use_dora: bool = False
    seed: int = 0
    layers: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_share("eta", self.eta, open_end=True)
        check_choice("basis", self.basis, ("haar", "fft"))
        check_factor("alpha", self.alpha)
        check_flag("use_dora", self.use_dora)
        object.__setattr__(self, "eta", float(self.eta))
        object.__setattr__(self, "alpha", float(self.alpha))

    @classmethod
    def editing_defaults(cls, chosen: Mapping[str, Any]) -> dict[str, Any]:
        return editing_rank(chosen)

    @classmethod
    def at_budget(cls, numbers: int, shape: tuple[int, int]) -> dict[str, Any]:
        rank = 2 * (numbers // sum(shape))  # because half of each spectrum is empty
        return {"r": rank, "alpha": float(rank)}

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def count(self, size: int) -> int:
        """Return the number of trained values of an r x `size` factor, exactly for eta as it is written in decimal.

        Raises:
            ValueError: no value is left to train.
        """
        count = math.floor((1 - Fraction(repr(self.eta))) * self.r * size)
        if count < 1:
            raise ValueError(f"eta={self.eta}: of {self.r} x {size} cells none is left to be trained")
        return count

    def build(self, shape: tuple[int, int]) -> SpectralLowRank:
        check_rank(self.r, shape)
        counts = self.count(shape[0]), self.count(shape[1])
        return SpectralLowRank(shape, self.r, counts, self.scale, basis=self.basis, weight_decomposed=self.use_dora)

    def initialize(self, update: SpectralLowRank, projection: Projection, generator: torch.Generator) -> None:
        rows, cols = update.shape
        update.up_cells.copy_(self._cells((rows, self.r), len(update.up_cells)))
        update.down_cells.copy_(self._cells((self.r, cols), len(update.down_cells)))
        # LoRA's initialization, Kaiming uniform with a = sqrt(5), has variance 1 / (3 q) in each of the r * q entries.
        variance = self.r / (3 * _energy(update.down_cells, (self.r, cols), self.basis))
        nn.init.normal_(update.down_coefficients, std=math.sqrt(variance), generator=generator)
        start_magnitude(update, projection)

    def _cells(self, shape: tuple[int, int], count: int) -> Tensor:
        return distinct(count, shape[0] * shape[1], generator_of(self.seed, _key(*shape)))

    def file_layout(self, shapes: Mapping[str, tuple[int, int]]) -> dict[str, TensorSpec]:
        found = {key: must for key, must in super().file_layout(shapes).items() if not key.endswith("_cells")}
        for rows, cols in shapes.values():
            for size, matrix in ((rows, (rows, self.r)), (cols, (self.r, cols))):
                found[_key(*matrix)] = TensorSpec((self.count(size),), ("I32",), cells_of=matrix)
        return found

    def to_tensors(self, updates: Mapping[str, Update], dtype: torch.dtype) -> dict[str, Tensor]:
        found = {key: value for key, value in super().to_tensors(updates, dtype).items() if not key.endswith("_cells")}
        for update in updates.values():
            found[_key(update.shape[0], self.r)] = stored(update, "up_cells").to("cpu", torch.int32)
            found[_key(self.r, update.shape[1])] = stored(update, "down_cells").to("cpu", torch.int32)
        return found

    def check_values(self, projection: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        up, down = (tensors[f"{projection}.{half}_coefficients"] for half in ("up", "down"))
        check_product(projection, self.scale, up, down)  # no entry of an atom is larger than 1

    def from_tensors(
        self, projection: str, shape: tuple[int, int], tensors: Mapping[str, Tensor], room: int | None = None
    ) -> Update:
        cells = {"up_cells": tensors[_key(shape[0], self.r)], "down_cells": tensors[_key(self.r, shape[1])]}
        return super().from_tensors(projection, shape, {**tensors, **{f"{projection}.{k}": v for k, v in cells.items()}}, room)


def _key(rows: int, cols: int) -> str:
    return f"cells.{rows}x{cols}"
