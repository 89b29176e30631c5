"""Rules that choose more than cells: an order of rows and columns, directions, or where components relocate later."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loca_vision.dct import dct2, idct2
from location_study.gradient_spectra import GradientSpectrum
from location_study.informed_cells import InformedCellsConfig

CELLS = ""  # the key of the flat cells
_EVERY, _UNTIL = 20, 0.75  # steps between relocations, and the share of all steps after which they end, as in RigL


@dataclass(frozen=True)
class InformedRule:
    """A rule that chooses the parts of an `InformedCells` update.

    Args:
        parts: a function that returns, for a projection and a budget, the flat cells under `CELLS` and the other initial parts
            of `InformedCells`.
        about: the description in tables.
        moves: whether components relocate during training.
        directions: whether a third of the numbers are for directions.
    """

    parts: Callable[[GradientSpectrum, int, torch.Generator], dict[str, Tensor]]
    about: str
    moves: bool = False
    directions: bool = False

    def flags(self, budget: int, steps: int) -> list[str]:
        """Return the flags for train.py."""
        side = directions_of(budget) if self.directions else 0
        told = {"directions": side}
        if self.moves:
            told |= {"relocate_every": _EVERY, "relocate_until": round(_UNTIL * steps)}
        words = ["--method", InformedCellsConfig.method, "--n_components", str(budget - side**2)]
        return [*words, *(f"--set={name}={value}" for name, value in told.items())]


def directions_of(budget: int) -> int:
    """Return the largest k whose k^2 numbers take up at most a third of the budget."""
    return math.isqrt(budget // 3)


def _reordered(of: GradientSpectrum, budget: int, draws: torch.Generator) -> dict[str, Tensor]:
    """Sort rows and columns so that those with similar gradients are adjacent and low frequencies can move them together.

    Source: S2FT, CVPR 2026.
    """
    gradient, left, right = _factored(of)
    rows, columns = left[:, 0].argsort(), right[:, 0].argsort()
    spectrum = dct2(gradient[rows][:, columns])
    return {
        CELLS: spectrum.abs().flatten().topk(budget).indices,
        "rows": rows.argsort(),
        "columns": columns.argsort(),
    }


def _directions(of: GradientSpectrum, budget: int, draws: torch.Generator) -> dict[str, Tensor]:
    _, left, right = _factored(of)
    side = directions_of(budget)
    return {CELLS: _drawn(of, budget - side**2, draws), "left": left[:, :side], "right": right[:, :side]}


def _relocated(of: GradientSpectrum, budget: int, draws: torch.Generator) -> dict[str, Tensor]:
    return {CELLS: _drawn(of, budget, draws)}


def _factored(of: GradientSpectrum) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient (p, q) and its left and right singular vectors as the columns of two matrices."""
    gradient = idct2(of.total)
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    return gradient, left, right.T


def _drawn(of: GradientSpectrum, count: int, draws: torch.Generator) -> Tensor:
    return torch.randperm(of.total.numel(), generator=draws)[:count]


INFORMED = {
    "reordered": InformedRule(
        _reordered, "largest abs(sum Z) after sorting rows and columns by the gradient's first singular vectors"
    ),
    "directions": InformedRule(
        _directions,
        "for a third of the numbers products of the gradient's first singular vectors, for the others any cell",
        directions=True,
    ),
    "relocated": InformedRule(
        _relocated, "any cell; then the smallest go where the gradient is largest, every 20 steps until 75 %", moves=True
    ),
}


def energy(of: GradientSpectrum, parts: dict[str, Tensor]) -> float:
    """Return the part of the gradient's squared norm that the update can reach at first."""
    gradient, held = idct2(of.total), 0.0
    if "left" in parts:
        core = parts["left"].T @ gradient @ parts["right"]
        held += float(core.square().sum())
        gradient = gradient - parts["left"] @ core @ parts["right"].T
    if "rows" in parts:
        gradient = gradient[parts["rows"].argsort()][:, parts["columns"].argsort()]
    return held + float(dct2(gradient).flatten()[parts[CELLS]].square().sum())
