"""Frequencies of activations, piece by piece, computed once for all layers that are called with the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from loca_vision.functional.packed_dct import pieces
from loca_vision.functional.token_bases import TokenBasis


@dataclass(frozen=True)
class Piece:
    """Frequencies (g, q', n) of samples `first` to `end`, for n of their tokens from `token` on."""

    first: int
    end: int
    token: int
    values: Tensor


def shared_frequencies(x: Tensor, basis: TokenBasis) -> Sequence[Piece]:
    """Return the frequencies of x (M, t, q), computed once for all views of the same memory, as in query, key and value."""
    if x.is_inference():
        return list(frequencies_of(x, basis))
    base = x._base if x._base is not None else x
    mark = basis, x.shape, x.stride(), x.data_ptr(), x._version, torch.get_num_threads()
    known = _known.get(base)
    if known is None or known[0] != mark:
        _known[base] = known = mark, list(frequencies_of(x, basis))
    found: Sequence[Piece] = known[1]
    return found


_known: Any = WeakTensorKeyDictionary()  # by tensors that are still in use


def frequencies_of(x: Tensor, basis: TokenBasis) -> Iterator[Piece]:
    """Yield the frequencies of x (M, t, q) in pieces of the size that is transformed fastest."""
    for first, end, token, last in _portions(x):
        part = x[first:end, token:last].to(wide(x))
        values = basis.analyse(part.reshape(-1, x.shape[2])).view(*part.shape[:2], -1)
        yield Piece(first, end, token, values.transpose(1, 2).contiguous())


def _portions(x: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """Yield the bounds of each piece, first in samples and then in tokens; on the CPU, a piece fits into the cache."""
    samples, tokens, width = x.shape
    if x.device.type != "cpu":
        yield 0, samples, 0, tokens
        return
    at_once = next((end for _, end in pieces(samples * tokens, width, torch.get_num_threads())), 1)
    if at_once >= tokens:
        many = max(1, at_once // max(1, tokens))
        yield from ((first, min(first + many, samples), 0, tokens) for first in range(0, samples, many))
    else:
        for first in range(samples):
            yield from ((first, first + 1, start, end) for start, end in pieces(tokens, width, torch.get_num_threads()))


def wide(x: Tensor) -> torch.dtype:
    """Return the dtype to compute in, which is at least float32."""
    return torch.promote_types(x.dtype, torch.float32)
