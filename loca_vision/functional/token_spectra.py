"""The frequencies of activations, token by token, and what sparse spectra make of them without a matrix.

The gradient of y = x W^T is G = dY^T X, summed over n tokens, and its spectrum Z = C G D^T = (dY C^T)^T (X D^T). Where Z is
asked for at few cells, the two factors can be transformed token by token, O(n (p + q) log), and each cell is then one dot
product of n numbers; the whole product would cost O(n p q). In the same way x Delta W^T = (X D^T) S^T C for a sparse S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from loca_vision.functional.cosine_atoms import Cells, Offset
from loca_vision.functional.packed_dct import add_samples, frequencies, pieces
from loca_vision.functional.sparse_products import Sums, product

Pieces = tuple[Tensor, ...]  # of the frequencies (q', n) of some tokens after the others


def spectra_at(
    right: Pieces,
    grads: list[Tensor],
    layouts: list[Cells],
    places: list[list[Offset]],
    backs: Sequence[Tensor | None],
) -> tuple[list[dict[Offset, Tensor]], list[Tensor]]:
    """Values of Z = C (dY^T X) D^T at cells and beside them, and the gradient of the frequencies of X.

    Args:
        right: the frequencies of the activations X (n, q), which all share.
        grads: (n, p) gradients dY of one or more outputs of x.
        layouts: for each of these the cells (B, 2) of a matrix (p, q).
        places: for each the offsets from its cells.
        backs: for each the sparse (q', p') that takes frequencies of dY to gradients of `right`, where one is wanted.

    Returns:
        For each and for each of its places (B,) values in the dtype of `right`; and a gradient for every piece of `right`, or
        nothing where none is wanted.
    """
    sums = [
        {place: Sums(layout, place, right[0].dtype) for place in wanted} for layout, wanted in zip(layouts, places, strict=True)
    ]
    onward: list[Tensor] = []
    for grad, parts, back in zip(grads, sums, backs, strict=True):
        if not parts and back is None:
            continue
        for i, (tokens, piece) in enumerate(zip(split_like(grad, right), right, strict=True)):
            left = frequencies(tokens.to(piece.dtype))
            for part in parts.values():
                part.add(left, piece)
            if back is not None and i == len(onward):
                onward.append(product(back, left))
            elif back is not None:
                product(back, left, onward[i])
    return [{place: part.values() for place, part in parts.items()} for parts in sums], onward


def add_applied(y: Tensor, spectrum: Tensor, right: Pieces) -> None:
    """Add iDCT(S DCT(x)) of every token to the rows of y (n, p), in place; the sparse S is (p', q')."""
    for tokens, piece in zip(split_like(y, right), right, strict=True):
        add_samples(tokens, product(spectrum, piece))


def in_pieces(x: Tensor, threads: int | None = None) -> Pieces:
    """The frequencies of x (n, q), in float32 at least; in pieces for so many threads, by default for all."""
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = pieces(len(x), x.shape[1], threads or torch.get_num_threads())
    return tuple(frequencies(x[start:end].to(wide)) for start, end in parts)


def shared_pieces(x: Tensor) -> Pieces:
    """The same of x (..., q), differentiable where gradients are wanted; once for all who ask with the same tensor.

    Query, key and value of an attention layer do, and every layer that looks at the same text.
    """
    wanted = torch.is_grad_enabled() and x.requires_grad
    if x.is_inference() or (wanted and x.is_leaf):  # that has no version; this is held by its gradient, and by itself with it
        return _pieces_of(x, wanted)
    mark = wanted, x._version, x.data_ptr(), torch.get_num_threads()
    known = _known.get(x)
    if known is None or known[0] != mark:
        _known[x] = known = mark, _pieces_of(x, wanted)
    found: Pieces = known[1]
    return found


_known: Any = WeakTensorKeyDictionary()  # of tensors that are still in use


def _pieces_of(x: Tensor, wanted: bool) -> Pieces:
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        found: Pieces = _Frequencies.apply(flat) if wanted else in_pieces(flat.detach())
    return found


class _Frequencies(torch.autograd.Function):
    """As differentiable as `add_applied` and `spectra_at` need it: rows of no frequency's first place count for nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Pieces:
        found = in_pieces(x)
        ctx.about = x.shape, x.dtype, [piece.shape[1] for piece in found]
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        shape, dtype, lengths = ctx.about
        given = [grad for grad in grads if grad is not None]
        if not given:
            return None
        result = given[0].new_zeros(shape)
        for tokens, grad in zip(torch.split(result, lengths), grads, strict=True):
            if grad is not None:
                add_samples(tokens, grad)
        return result.to(dtype)


def split_like(tokens: Tensor, right: Pieces) -> tuple[Tensor, ...]:
    """The tokens (n, p) that belong to each of the pieces."""
    return torch.split(tokens, [piece.shape[1] for piece in right])
