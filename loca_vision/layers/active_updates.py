"""The updates that act on one weight now: add them to the weight, and find those that need no matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loca_vision.functional.cosine_atoms import Cosines
from loca_vision.functional.low_rank_linear import LowRankRows
from loca_vision.functional.row_linear import RowDelta, Rows, add_in_place, add_rows
from loca_vision.functional.transforms import functional_only
from loca_vision.layers.call_settings import CallSettings
from loca_vision.methods.update import Update


@dataclass(frozen=True)
class ActiveUpdate:
    """One update that acts on a weight, with its projection, the rows it acts on and its strength."""

    projection: str
    rows: Rows
    update: Update
    strength: float

    def weight_rows(self, weight: Tensor | None, device: torch.device) -> Tensor | None:
        """Return the rows of W that the update depends on, or None if it does not depend on W."""
        if weight is None or not self.update.needs_weight:
            return None
        rows = self.rows.to(weight.device) if isinstance(self.rows, Tensor) else self.rows  # W may be offloaded
        return (weight if rows is None else weight[rows]).to(device)


Updates = Sequence[ActiveUpdate]


def tensors_of(updates: Updates) -> Iterator[Tensor]:
    """Yield all tensors that the updates are made from."""
    for active in updates:
        yield from active.update.tensors()


def learn(updates: Updates) -> bool:
    """Whether training can change any of the updates."""
    return any([active.update.learns() for active in updates])


def deltas_of(updates: Updates, base: Tensor, call: CallSettings | None, device: torch.device | None = None) -> list[RowDelta]:
    """Return the rows and the update of each projection, summed over adapters.

    Args:
        updates: the updates to sum.
        base: W (n, q), for updates that depend on it.
        call: the settings of the call; None leaves out the call's scale.
        device: the device of the result; by default that of W.
    """
    device = device or base.device
    scale = 1.0 if call is None else call.scale
    deltas: dict[str, RowDelta] = {}
    for active in updates:
        delta = active.update("delta", scale * active.strength, active.weight_rows(base, device)).to(device)
        if call is not None:
            delta = call.scaled_in_graph(delta)
        if active.projection in deltas:
            delta = deltas[active.projection][1] + delta
        deltas[active.projection] = active.rows, delta
    return list(deltas.values())


def sum_with(updates: Updates, base: Tensor, call: CallSettings | None) -> Tensor:
    """Return W + the updates, (n, q) in W's dtype.

    If no gradient is recorded, the updates are added in place to a copy of W, with bitwise the same result.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or functional_only():
        return add_rows(base, deltas_of(updates, base, call))
    wide = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
    scale = 1.0 if call is None else call.scale
    for group in _by_projection(updates):
        if len(group) > 1 or isinstance(group[0].rows, Tensor):
            add_in_place(wide, deltas_of(group, base, call))
        else:
            active = group[0]
            rows = wide[active.rows or slice(None)]
            active.update("add_to", rows, scale * active.strength, active.weight_rows(base, base.device))
    return wide.to(base.dtype)


def split_low_rank(updates: Updates, call: CallSettings) -> tuple[list[ActiveUpdate], list[LowRankRows]]:
    """Return the updates that must be built as matrices, and the factors of the low-rank ones."""
    matrices, pairs = [], []
    for active in updates:
        factors = active.update.factors(call.scale * active.strength)
        if factors is None:
            matrices.append(active)
        else:
            pairs.append((active.rows, call.scaled_in_graph(factors[0]), factors[1]))
    return matrices, pairs


def learned_cosines(updates: Updates, scale: float, device: torch.device) -> list[tuple[ActiveUpdate, Cosines]] | None:
    """Return the trained updates as sums of cosines, or None unless all of them are such sums and are on the device."""
    learned: list[tuple[ActiveUpdate, Cosines]] = []
    for active in updates:
        if not active.update.learns():
            continue
        cosines = active.update.cosines(scale * active.strength)
        if cosines is None or cosines.coefficients.device != device:
            return None
        learned.append((active, cosines))
    return learned


def _by_projection(updates: Updates) -> list[list[ActiveUpdate]]:
    groups: dict[str, list[ActiveUpdate]] = {}
    for active in updates:
        groups.setdefault(active.projection, []).append(active)
    return list(groups.values())
