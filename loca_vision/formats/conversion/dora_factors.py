"""The parts of a DoRA besides the weight it rescales: its factors, and a magnitude for each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.layers.projection_rows import ProjectionRows
from loca_vision.methods.lora import LowRank
from loca_vision.methods.update import Update


@torch.no_grad()
def dora_of(updates: Sequence[tuple[ProjectionRows, Update]], shape: tuple[int, int]) -> tuple[LowRankPair, Tensor] | None:
    """Return scale * B A of a whole weight, and the magnitudes (p,) of its rows.

    Args:
        updates: the updates of the projections that are rows of that weight.
        shape: (p, q) of the weight.

    Returns:
        The pair, or None if an update is not a DoRA, or if some rows have none: only the weight gives their magnitude.
    """
    magnitudes = torch.full(shape[:1], torch.nan)
    ups, downs = [], []
    for place, update in updates:
        if not isinstance(update, LowRank) or update.magnitude is None:
            return None
        rows = slice(None) if place.rows is None else place.rows
        up, down = update.pair()
        whole = up.new_zeros(shape[0], up.shape[1])
        whole[rows] = update.scale * up
        ups.append(whole)
        downs.append(down)
        magnitudes[rows] = update.magnitude
    return None if magnitudes.isnan().any() else (LowRankPair(torch.cat(downs), torch.cat(ups, 1)), magnitudes)
