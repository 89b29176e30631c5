"""How much of an update is lost when it is converted, and what it would take to lose little."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loca_vision.messages import aligned

MUCH, LITTLE = 0.3, 0.05  # relative errors: a conversion warns above the first; the advice aims at the second


@dataclass(frozen=True)
class LayerFidelity:
    """What one layer keeps of its update.

    Args:
        layer: the projection, the module, or the parameter.
        shape: the shape of the update, (p, q) for a matrix.
        kept: the number of components, the rank, or the count of numbers kept; 0 if nothing is.
        norm, error: Frobenius norms of the update and of the part that is lost; NaN if unknown.
        why: for a layer that is left out, the reason.
        squares: squared singular values, the largest first, if ranks were cut: they tell what other ranks would lose.
    """

    layer: str
    shape: tuple[int, ...]
    kept: int
    norm: float
    error: float
    why: str = ""
    squares: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def relative(self) -> float:
        """error / norm; 0 if nothing is lost, NaN if unknown."""
        return self.error / self.norm if self.error else 0.0

    @property
    def counts(self) -> bool:
        """Whether the size of the layer's update is known."""
        return not math.isnan(self.norm)


def left_out_entirely(layer: str, shape: tuple[int, ...], norm: float, why: str) -> LayerFidelity:
    """Describe a layer of which nothing is kept; the norm is NaN if unknown."""
    return LayerFidelity(layer, shape, 0, norm, norm, why)


def total_loss(losses: Iterable[LayerFidelity]) -> float:
    """Return the relative error of all layers of known size together, including those left out."""
    known = [loss for loss in losses if loss.counts]
    norm = math.hypot(*(loss.norm for loss in known))
    return math.hypot(*(loss.error for loss in known)) / norm if norm else 0.0


def rank_losing(share: float, losses: Iterable[LayerFidelity]) -> int | None:
    """Return the lowest rank, the same for all layers, with which their relative error together is at most `share`.

    Layers that are left out do not count, since no rank brings them back. Return None if no layer's rank was cut.
    """
    spectra = [loss.squares.double() for loss in losses if loss.squares is not None and not loss.why]
    if not spectra:
        return None
    together = torch.zeros(max(map(len, spectra)), dtype=torch.float64)
    for squares in spectra:
        together[: len(squares)] += squares
    lost = together.sum() - together.cumsum(0)
    return int((lost > share**2 * together.sum()).sum()) + 1 if together.any() else 1


def loss_table(losses: Sequence[LayerFidelity], unit: str) -> str:
    """Return a line for each layer and one for all: shape, what is kept (`unit`), norm of the update, relative error."""
    rows = [("layer", "shape", unit, "norm", "relative error")]
    for loss in losses:
        shape = " x ".join(map(str, loss.shape))
        rows.append((loss.layer, shape, str(loss.kept), _number(loss.norm), _number(loss.relative)))
    norm = math.hypot(*(loss.norm for loss in losses if loss.counts))
    rows.append(("all", "", str(sum(loss.kept for loss in losses)), f"{norm:.4g}", f"{total_loss(losses):.4g}"))
    return aligned(rows, str.ljust)


def _number(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.4g}"
