"""Add updates to some rows of a weight, and compute a linear map whose gradient is computed for those rows only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from loca_vision.functional.transforms import functional_only, once_differentiable, ordinary_tensors

Rows = slice | Tensor | None  # a range, an index (p,) int64, or all rows
RowDelta = tuple[Rows, Tensor]  # the rows, and what is added to them: (p, q)


def rows_on(rows: Rows, device: torch.device) -> Rows:
    """Return the rows for use on a device. An index is copied there only once, because every copy makes the host wait."""
    if not isinstance(rows, Tensor) or device.type in (rows.device.type, "meta") or torch.compiler.is_compiling():
        return rows
    known = _copied.setdefault(rows, {})
    if device not in known:
        with ordinary_tensors():
            known[device] = rows.to(device)
    found: Tensor = known[device]
    return found


_copied: Any = WeakTensorKeyDictionary()


def add_rows(base: Tensor, updates: list[RowDelta]) -> Tensor:
    """Return `base` (n, q) with each update (p, q) added to its rows, rounded to base's dtype once.

    Other rows stay bit-identical. Slices are joined by one concatenation, whose gradients are views of the weight's gradient;
    interleaved rows are added through an index.
    """
    wide = base if base.dtype == torch.float64 else base.float()
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or functional_only()):
        return add_in_place(wide.clone() if wide is base else wide, updates).to(base.dtype)
    slices = [(rows or slice(0, len(base)), delta) for rows, delta in updates if not isinstance(rows, Tensor)]
    pieces, end = [], 0
    for rows, delta in sorted(slices, key=lambda update: update[0].start):
        pieces += [wide[end : rows.start]] * (rows.start > end) + [wide[rows] + delta]
        end = rows.stop
    pieces += [wide[end:]] * (end < len(base))
    wide = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
    for index, delta in updates:
        if isinstance(index, Tensor):
            wide = wide.index_add(0, index.to(base.device), delta.to(wide.dtype))
    return wide.to(base.dtype)


def add_in_place(weight: Tensor, updates: list[RowDelta]) -> Tensor:
    """Do the same as `add_rows` in place without gradients, in a fifth of the time; changes and returns `weight` (n, q)."""
    for rows, delta in updates:
        if isinstance(rows, Tensor):
            weight.index_add_(0, rows.to(weight.device), delta.to(weight.dtype))
        else:
            weight[rows or slice(None)] += delta
    return weight


def computed_in(x: Tensor) -> torch.dtype:
    """Return the dtype of a product with x: autocast's dtype if it is on, except for float64, which autocast leaves alone."""
    autocast = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if autocast else x.dtype


def as_computed(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the operands of a product, in autocast's dtype if it is on."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = computed_in(x)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[RowDelta]) -> Tensor:
    """Return x weight^T + bias, (..., q) to (..., n), in autocast's dtype if autocast is on.

    `weight` (n, q) already contains the updates and gets no gradient. An update's gradient is that of its own rows of the
    weight, so that rows without an update, such as the key of a fused qkv, cost nothing.
    """
    rows, deltas = zip(*updates, strict=True)
    result: Tensor = _RowLinear.apply(*as_computed(x, weight, bias), rows, *deltas)
    return result


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[Rows, ...], *deltas: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, _, wants_bias, _, *wanted = ctx.needs_input_grad
        flat, features = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1]).to(grad.dtype)
        deltas = [
            (flat if rows is None else flat[:, rows]).T @ features if wants else None
            for rows, wants in zip(ctx.rows, wanted, strict=True)
        ]
        return grad @ weight if wants_x else None, None, flat.sum(0) if wants_bias else None, None, *deltas
