"""How much of an update is lost when it is converted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from loca_vision.messages import aligned


@dataclass(frozen=True)
class LayerFidelity:
    """What one layer keeps of its update.

    Args:
        layer: the projection, or the module.
        shape: (p, q).
        kept: components, or the rank.
        norm, error: Frobenius norms of the update and of what is lost of it.
    """

    layer: str
    shape: tuple[int, int]
    kept: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        return self.error / self.norm if self.norm else 0.0


def left_out_entirely(layer: str, shape: tuple[int, int], norm: float) -> LayerFidelity:
    """A layer of which nothing is kept."""
    return LayerFidelity(layer, shape, 0, norm, norm)


def total_loss(losses: Sequence[LayerFidelity]) -> float:
    """The relative error of all layers together."""
    norm = math.hypot(*(loss.norm for loss in losses))
    return math.hypot(*(loss.error for loss in losses)) / norm if norm else 0.0


def loss_table(losses: Sequence[LayerFidelity], unit: str) -> str:
    """A line for each layer, and one for all: shape, what is kept (`unit`), norm of the update, relative error."""
    rows = [("layer", "shape", unit, "norm", "relative error")]
    for loss in losses:
        rows.append(
            (loss.layer, f"{loss.shape[0]} x {loss.shape[1]}", str(loss.kept), f"{loss.norm:.4g}", f"{loss.relative:.4g}")
        )
    norm = math.hypot(*(loss.norm for loss in losses))
    rows.append(("all", "", str(sum(loss.kept for loss in losses)), f"{norm:.4g}", f"{total_loss(losses):.4g}"))
    return aligned(rows, str.ljust)
