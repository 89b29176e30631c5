"""Apply updates to activations, for weights that cannot be read or must not be copied."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from loca_vision.functional.low_rank_linear import low_rank_term
from loca_vision.functional.row_linear import add_rows, computed_in
from loca_vision.layers.active_updates import Updates, deltas_of, split_low_rank
from loca_vision.layers.call_settings import CallSettings


def matrix_of(x: Tensor, rows: int, updates: Updates, weight: Tensor | None, call: CallSettings) -> Tensor:
    """Return the sum of the updates, (rows, q), on the device of x (..., q) and in the dtype of a product with x."""
    zeros = torch.zeros(rows, x.shape[-1], device=x.device)
    return add_rows(zeros, deltas_of(updates, zeros if weight is None else weight, call, x.device)).to(computed_in(x))


def learned_term(x: Tensor, rows: int, updates: Updates, weight: Tensor | None, call: CallSettings) -> Tensor:
    """Return x (..., q) times the sum of the updates, (..., rows), differentiable in x and in the trained parameters."""
    matrices, pairs = split_low_rank(updates, call)
    term = F.linear(x, matrix_of(x, rows, matrices, weight, call)) if matrices else x.new_zeros(())
    return term + low_rank_term(x, rows, pairs) if pairs else term


def term_without_matrix(x: Tensor, rows: int, updates: Updates, weight: Tensor | None, call: CallSettings) -> Tensor:
    """Return x (..., q) times the sum of the updates, (..., rows), differentiable in x only.

    No matrix is built unless a method needs one.
    """
    result = x.new_zeros(*x.shape[:-1], rows)
    for active in updates:
        strength = call.scale * active.strength
        term = active.update("apply_to", x, strength, active.weight_rows(weight, x.device))
        term = call.scaled_in_graph(term.to(result.dtype))
        if active.rows is None and term.shape == result.shape:
            result = result + term
        else:
            where = torch.arange(rows, device=x.device)[active.rows if active.rows is not None else slice(None)]
            result = result.index_add(-1, where, term)
    return result
