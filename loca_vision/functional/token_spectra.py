"""Compute the frequencies of activations token by token, and apply sparse spectra to them without building a matrix.

The gradient of y = x W^T is G = dY^T X, summed over n tokens, and its spectrum is Z = C G D^T = (dY C^T)^T (X D^T). If Z is
needed at few cells, the two factors can be transformed token by token, O(n (p + q) log), and each cell is then one dot
product of n numbers; the whole product would cost O(n p q). In the same way, x Delta W^T = (X D^T) S^T C for a sparse S.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loca_vision.functional.cosine_atoms import Cells, Offset
from loca_vision.functional.packed_dct import add_samples, frequencies, pieces
from loca_vision.functional.sparse_products import Sums, product
from loca_vision.functional.transforms import once_differentiable

Pieces = tuple[Tensor, ...]  # the frequencies (q', n) of consecutive groups of tokens


def spectra_at(
    right: Pieces,
    grads: list[Tensor],
    layouts: list[Cells],
    offsets: list[list[Offset]],
    backs: Sequence[Tensor | None],
) -> tuple[list[dict[Offset, Tensor]], list[Tensor]]:
    """Return values of Z = C (dY^T X) D^T at cells and next to them, and the gradient of the frequencies of X.

    Args:
        right: the frequencies of the activations X (n, q), which all outputs share.
        grads: (n, p) gradients dY of one or more outputs of x.
        layouts: for each output, the cells (B, 2) of a matrix (p, q).
        offsets: for each output, the offsets from its cells.
        backs: for each output, the sparse (q', p') matrix that maps frequencies of dY to gradients of `right`; None for no
            gradient.

    Returns:
        For each output, the values (B,) by offset in the dtype of `right`; and the gradient of every piece of `right`, which is
        an empty list if all of `backs` are None.
    """
    sums = [
        {offset: Sums(layout, offset, right[0].dtype) for offset in own} for layout, own in zip(layouts, offsets, strict=True)
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
    return [{offset: part.values() for offset, part in parts.items()} for parts in sums], onward


def add_applied(y: Tensor, spectrum: Tensor, right: Pieces) -> None:
    """Add iDCT(S DCT(x)) of every token to the rows of y (n, p), in place; the sparse S is (p', q')."""
    for tokens, piece in zip(split_like(y, right), right, strict=True):
        add_samples(tokens, product(spectrum, piece))


def in_pieces(x: Tensor, threads: int | None = None) -> Pieces:
    """Return the frequencies of x (n, q), at least in float32, in pieces sized for `threads` threads (default: all)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    cpu = x.device.type == "cpu"  # only on the CPU does the cache determine the size
    parts = pieces(len(x), x.shape[1], threads or torch.get_num_threads()) if cpu else [(0, len(x))] * bool(len(x))
    return tuple(frequencies(x[start:end].to(wide)) for start, end in parts)


def shared_pieces(x: Tensor) -> Pieces:
    """Return the same for x (..., q), differentiable if gradients are recorded; computed once for all calls with one tensor.

    Query, key and value of an attention layer share x, and all cross-attention layers share the text.
    """
    recorded = torch.is_grad_enabled() and x.requires_grad
    # Inference tensors have no version. The frequencies of a leaf keep it alive through their graph, so its weak key would
    # never be freed.
    if x.is_inference() or (recorded and x.is_leaf):
        return _pieces_of(x, recorded)
    mark = recorded, x._version, x.data_ptr(), torch.get_num_threads()
    known = _known.get(x)
    if known is None or known[0] != mark:
        _known[x] = known = mark, _pieces_of(x, recorded)
    found: Pieces = known[1]
    return found


_known: Any = WeakTensorKeyDictionary()  # by tensors that are still in use


def _pieces_of(x: Tensor, recorded: bool) -> Pieces:
    flat = x.reshape(-1, x.shape[-1])
    with torch.autocast(x.device.type, enabled=False):
        found: Pieces = _Frequencies.apply(flat) if recorded else in_pieces(flat.detach())
    return found


class _Frequencies(torch.autograd.Function):
    """`in_pieces` with the gradient that `add_applied` and `spectra_at` produce, whose unused rows are zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Pieces:
        pieces = in_pieces(x)
        ctx.sizes = x.shape, x.dtype, [piece.shape[1] for piece in pieces]
        ctx.set_materialize_grads(False)
        return pieces

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        shape, dtype, lengths = ctx.sizes
        first = next((grad for grad in grads if grad is not None), None)
        if first is None:
            return None
        result = first.new_zeros(shape)
        for tokens, grad in zip(torch.split(result, lengths), grads, strict=True):
            if grad is not None:
                add_samples(tokens, grad)
        return result.to(dtype)


def split_like(tokens: Tensor, right: Pieces) -> tuple[Tensor, ...]:
    """Split tokens (n, p) into the parts that belong to each of the pieces."""
    return torch.split(tokens, [piece.shape[1] for piece in right])
