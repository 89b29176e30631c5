"""Frequencies of activations, piece by piece, computed once for all layers that ask with the same memory."""

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
    """Frequencies (g, q', n) of samples `first` to `end`, and of their tokens from `token` on."""

    first: int
    end: int
    token: int
    values: Tensor


def shared_frequencies(x: Tensor, basis: TokenBasis) -> Sequence[Piece]:
    """The frequencies of x (M, t, q), computed once for all that ask with views of the same memory: query, key and value do."""
    if x.is_inference():
        return list(frequencies_of(x, basis))
    base = x._base if x._base is not None else x
    mark = basis, x.shape, x.stride(), x.data_ptr(), x._version, torch.get_num_threads()
    known = _known.get(base)
    if known is None or known[0] != mark:
        _known[base] = known = mark, list(frequencies_of(x, basis))
    found: Sequence[Piece] = known[1]
    return found


_known: Any = WeakTensorKeyDictionary()  # of tensors that are still in use


def frequencies_of(x: Tensor, basis: TokenBasis) -> Iterator[Piece]:
    """The frequencies of x (M, t, q), of as many vectors at a time as are transformed fastest."""
    for first, end, token, last in _portions(x):
        part = x[first:end, token:last].to(wide(x))
        values = basis.analyse(part.reshape(-1, x.shape[2])).view(*part.shape[:2], -1)
        yield Piece(first, end, token, values.transpose(1, 2).contiguous())


def _portions(x: Tensor) -> Iterator[tuple[int, int, int, int]]:
    """First and last sample, first and last token of what is transformed at a time: on the CPU what its cache holds."""
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
    """What is computed in: float32 at least."""
    return torch.promote_types(x.dtype, torch.float32)
