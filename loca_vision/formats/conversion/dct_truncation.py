"""Keep the few DCT coefficients that are closest to given matrices, per matrix or under one budget for all of them.

The transform is orthonormal, so the largest coefficients are the best choice of that many cells, and the error is the norm of
the others (Parseval): no matrix has to be rebuilt to know it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from loca_vision.checks import is_finite
from loca_vision.functional.dct import dct2

BudgetRule = Literal["count", "threshold", "ratio", "energy"]
# Positive float32 numbers sort as their bits do: without the lower 16 bits, 2**15 bins whose edges are less than 1 % apart.
_CUT, _BINS = 16, 2**15


@dataclass(frozen=True)
class Budget:
    """How many components to keep.

    Args:
        kind: "count", a whole number of components; "threshold", those with |coefficient| from `amount` up; "ratio", this
            share of all cells, in (0, 1]; "energy", as few as hold this share of the squared norm, in (0, 1].
        amount: the number.
        shared: one budget for all matrices instead of one for each. Even so, every matrix gets at least one component, because
            a file cannot have a projection without any.

    Raises:
        ValueError: a field is invalid; the error names the field, its value and the rule.
    """

    kind: BudgetRule
    amount: float
    shared: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(BudgetRule):
            raise ValueError(f"kind={self.kind!r}: the choices are {', '.join(get_args(BudgetRule))}")
        if not is_finite(self.amount):
            raise ValueError(f"{self.kind}={self.amount!r}: expected a finite number")
        if self.kind == "count" and (self.amount < 1 or self.amount != int(self.amount)):
            raise ValueError(f"count={self.amount!r}: expected a whole number from 1 up")
        if self.kind == "threshold" and self.amount <= 0:
            raise ValueError(f"threshold={self.amount!r}: expected a number above 0")
        if self.kind in ("ratio", "energy") and not 0 < self.amount <= 1:
            raise ValueError(f"{self.kind}={self.amount!r}: expected a share, above 0 and at most 1")


@dataclass(frozen=True)
class Components:
    """What is kept of one matrix.

    Args:
        coefficients: (n,) float32, in the order of the cells.
        cells: (n,) int64, row * q + column, ascending.
        shape: (p, q) of the matrix.
        norm: Frobenius norm of the matrix.
        error: Frobenius norm of what is left out.
    """

    coefficients: Tensor
    cells: Tensor
    shape: tuple[int, int]
    norm: float
    error: float

    @property
    def relative_error(self) -> float:
        """error / norm, from 0 to 1; 0 for a matrix of zeros."""
        return self.error / self.norm if self.norm else 0.0


def largest_components(deltas: Mapping[str, Tensor], budget: Budget) -> dict[str, Components]:
    """Keep the largest DCT coefficients of each matrix, as many as the budget allows, at least one.

    No other choice of that many cells is closer. Among equal magnitudes the first matrix and cell win, so the result is
    deterministic. `deltas` may compute its matrices on access: one is held at a time, and each is read twice.

    Args:
        deltas: (p, q) real matrices by name.

    Returns:
        What is kept of each matrix, by name.

    Raises:
        ValueError: there is no matrix, one holds NaN or infinity, or a count is above the number of cells or below that of
            matrices.
        TypeError: a matrix is not a real floating-point tensor.
    """
    if not deltas:
        raise ValueError("there is no matrix to approximate")
    names = list(deltas)
    spectrum_of = lru_cache(maxsize=1)(lambda name: _spectrum(name, deltas[name]))
    kept: dict[str, Components] = {}
    for group in [names] if budget.shared else [[name] for name in names]:
        kept |= _of_group(group, spectrum_of, budget)
    return kept


def components_losing(share: float, deltas: Mapping[str, Tensor]) -> int:
    """Return how many components of all matrices together leave a relative error of at most `share` in each of them."""
    count = 0
    for name in deltas:
        squares = _spectrum(name, deltas[name]).flatten().double().square_().sort(descending=True).values
        lost = squares.sum() - squares.cumsum(0)
        count += int((lost > share**2 * squares.sum()).sum()) + 1
    return count


def total_error(kept: Iterable[Components]) -> float:
    """Return the relative error of all matrices together, in the Frobenius norm: from 0 to 1."""
    held = list(kept)
    norm = math.hypot(*(part.norm for part in held))
    return math.hypot(*(part.error for part in held)) / norm if norm else 0.0


def _spectrum(name: str, delta: Tensor) -> Tensor:
    if delta.dim() != 2 or not delta.numel():
        raise ValueError(f"{name} has shape {tuple(delta.shape)}: expected a matrix")
    spectrum = dct2(delta.detach().to(torch.promote_types(delta.dtype, torch.float32))).to(torch.float32)
    if not torch.isfinite(spectrum).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return spectrum


@dataclass(frozen=True)
class _Candidates:
    """The components of one matrix from the edge up, always including its largest, and the squared norm of those below."""

    name: str
    shape: tuple[int, int]
    values: Tensor
    cells: Tensor
    largest: int  # its cell
    energy: float
    below: float


def _of_group(names: Sequence[str], spectrum_of: Callable[[str], Tensor], budget: Budget) -> dict[str, Components]:
    edge, wanted = _edge(names, spectrum_of, budget)
    found = [_candidates(name, spectrum_of(name), edge) for name in names]
    magnitudes = torch.cat([one.values.abs() for one in found])
    first = torch.cat([one.cells == one.largest for one in found])
    # The largest of each matrix comes first, then the others by size; a stable sort keeps the order among equals.
    order = torch.where(first, torch.inf, magnitudes).argsort(descending=True, stable=True)
    keep = torch.zeros(len(order), dtype=torch.bool)
    keep[order[: _number(magnitudes[order], len(found), wanted, budget)]] = True
    parts = torch.split(keep, [len(one.cells) for one in found])
    return {one.name: _kept(one, part) for one, part in zip(found, parts, strict=True)}


def _edge(names: Sequence[str], spectrum_of: Callable[[str], Tensor], budget: Budget) -> tuple[float, float]:
    """Return a magnitude below which no component is kept, except the largest of each matrix, and the amount to keep:
    a number for a count or a ratio, a squared norm for energy."""
    if budget.kind == "threshold":
        return budget.amount, 0.0
    filled = torch.zeros(_BINS, dtype=torch.float64)
    cells = 0
    for name in names:
        magnitudes = spectrum_of(name).abs().flatten()
        weights = magnitudes.double().square() if budget.kind == "energy" else None
        bins = torch.bincount(magnitudes.view(torch.int32) >> _CUT, weights, minlength=_BINS)
        filled += bins
        cells += len(magnitudes)
    wanted = _wanted(budget, names, cells, float(filled.sum()))
    from_above = filled.flip(0).cumsum(0)
    bin_ = max(0, _BINS - 1 - int(torch.searchsorted(from_above, wanted)))
    return float(torch.tensor(bin_ << _CUT, dtype=torch.int32).view(torch.float32)), wanted


def _wanted(budget: Budget, names: Sequence[str], cells: int, total: float) -> float:
    if budget.kind == "energy":
        return budget.amount * total
    if budget.kind == "ratio":
        return float(max(len(names), round(budget.amount * cells)))
    where = names[0] if len(names) == 1 else "all of them together"
    if budget.amount > cells:
        raise ValueError(f"count={budget.amount:g}: {where} has {cells} cells")
    if budget.amount < len(names):
        raise ValueError(f"count={budget.amount:g}: each of {len(names)} matrices needs at least one component")
    return float(budget.amount)


def _candidates(name: str, spectrum: Tensor, edge: float) -> _Candidates:
    flat = spectrum.flatten()
    magnitudes = flat.abs()
    largest = int(magnitudes.argmax())
    taken = magnitudes >= edge
    taken[largest] = True
    cells = taken.nonzero().flatten()
    squares = flat.double().square_()
    energy, below = float(squares.sum()), float(squares.masked_fill_(taken, 0).sum())
    rows, cols = spectrum.shape
    return _Candidates(name, (rows, cols), flat[cells].clone(), cells, largest, energy, below)


def _number(descending: Tensor, matrices: int, wanted: float, budget: Budget) -> int:
    """Return how many of the candidates, in this order, to keep."""
    if budget.kind == "threshold":
        return len(descending)
    if budget.kind != "energy":
        return int(wanted)
    enough = int(torch.searchsorted(descending.double().square().cumsum(0), wanted)) + 1
    return max(matrices, min(enough, int((descending > 0).sum())))  # rounding may leave the sum just short of all


def _kept(one: _Candidates, keep: Tensor) -> Components:
    error = math.sqrt(one.below + float(one.values[~keep].double().square().sum()))
    return Components(one.values[keep], one.cells[keep], one.shape, math.sqrt(one.energy), error)
