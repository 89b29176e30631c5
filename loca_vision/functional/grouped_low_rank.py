"""Apply low-rank updates that differ from sample to sample to a batch by two batched products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loca_vision.functional.block_spectra import Share
from loca_vision.functional.row_linear import computed_in

Pair = tuple[Tensor, Tensor]  # (p, r) and (r, q)


def apply_grouped(x: Tensor, pairs: Sequence[Pair], shares: Sequence[Sequence[Share]]) -> Tensor:
    """Return x times each sample's own sum of products, (M, t, q) to (M, t, p), differentiable in x and in all factors.

    Args:
        x: the activations (M, t, q).
        pairs: all pairs of factors, of any ranks.
        shares: the pairs that each sample has, and their strengths; empty for a sample without any.
    """
    dtype = computed_in(x)
    ups, downs = torch.cat([up for up, _ in pairs], 1).to(dtype), torch.cat([down for _, down in pairs]).to(dtype)
    if all(list(own) == list(shares[0]) for own in shares) and len(shares[0]) == len(pairs) == 1:
        return (x.to(dtype) @ downs.T) @ (ups.T * shares[0][0][1])
    columns, strengths = _columns([up.shape[1] for up, _ in pairs], shares)
    chosen, factors = columns.to(x.device), strengths.to(x.device, dtype)
    inner = torch.bmm(x.to(dtype), downs[chosen].transpose(1, 2)) * factors[:, None]
    return torch.bmm(inner, ups.T[chosen])


def _columns(ranks: Sequence[int], shares: Sequence[Sequence[Share]]) -> tuple[Tensor, Tensor]:
    """Return the indices (M, R) of each sample's columns, and their strengths, which are 0 for columns that only pad."""
    ends = torch.tensor(ranks).cumsum(0).tolist()
    own = [
        [(column, strength) for index, strength in sample for column in range(ends[index] - ranks[index], ends[index])]
        for sample in shares
    ]
    most = max(map(len, own))
    filled = [sample + [(0, 0.0)] * (most - len(sample)) for sample in own]
    return (
        torch.tensor([[column for column, _ in sample] for sample in filled], dtype=torch.long).view(len(filled), most),
        torch.tensor([[strength for _, strength in sample] for sample in filled]).view(len(filled), most),
    )
