"""A linear map with cosine updates on some of its rows, and their gradients by the cheapest of three ways."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from loca_vision.functional.cosine_atoms import (
    AtomSettings,
    Cells,
    Cosines,
    Offset,
    coefficient_gradient,
    location_gradient,
    offsets,
)
from loca_vision.functional.cosine_sum import spectrum_at
from loca_vision.functional.cost_model import Strategy, Workload
from loca_vision.functional.row_linear import Rows, as_computed
from loca_vision.functional.sparse_products import spectrum_of, transposed_of
from loca_vision.functional.token_spectra import Pieces, add_applied, in_pieces, shared_pieces, spectra_at

CosineRows = tuple[Rows, Cosines]  # the rows, and what is added to them


def asked_of(cosines: Cosines) -> Workload:
    """What a step of training asks for."""
    moving, learned = cosines.locations.requires_grad, cosines.coefficients.requires_grad
    return Workload(cosines.form.shape, len(cosines.layout.cells), len(offsets(cosines.form.difference, learned, moving)))


def spectral_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[CosineRows], ways: list[Strategy]) -> Tensor:
    """x weight^T + bias with updates, in autocast's dtype where it is on: (..., q) to (..., n).

    `weight` (n, q) has no gradient; coefficients and locations have theirs. It contains the updates whose way is "whole" or
    "sampled": their gradient is the transform of their rows' own, or found from the activations without it. It does not contain
    those whose way is "applied": these are applied to the activations.
    """
    rows, cosines = zip(*updates, strict=True)
    numbers = [number for one in cosines for number in (one.coefficients, one.locations)]
    pieces = _pieces_for(x, ways)
    about = rows, [one.form for one in cosines], [one.layout for one in cosines], ways, len(pieces)
    result: Tensor = _SpectralLinear.apply(*as_computed(x, weight, bias), about, *pieces, *numbers)
    return result


def _pieces_for(x: Tensor, ways: list[Strategy]) -> Pieces:
    """The frequencies of x, kept for the gradient in its place; nothing where x takes less memory than they would."""
    if "applied" in ways:
        return shared_pieces(x)
    half = x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type)
    return tuple(piece.detach() for piece in shared_pieces(x)) if "sampled" in ways and not half else ()


@dataclass(frozen=True)
class _Part:
    """One update while its gradients are found."""

    rows: Rows
    form: AtomSettings
    layout: Cells
    way: Strategy
    coefficients: Tensor
    learned: bool
    moving: bool

    @property
    def offsets(self) -> list[Offset]:
        return offsets(self.form.difference, self.learned, self.moving)

    def rows_of(self, grad: Tensor) -> Tensor:
        return grad if self.rows is None else grad[:, self.rows]

    def scaled(self, dtype: torch.dtype) -> Tensor:
        return (self.coefficients * self.form.scale).to(dtype)

    def back(self, dtype: torch.dtype) -> Tensor | None:
        """What takes the output's gradient to that of the activations, where the weight does not."""
        return transposed_of(self.layout, self.scaled(dtype)) if self.way == "applied" else None

    def gradients(self, z: dict[Offset, Tensor]) -> list[Tensor | None]:
        """Of coefficients and locations."""
        found = {place: values.to(self.coefficients.dtype) for place, values in z.items()}
        return [
            coefficient_gradient(found, self.form) if self.learned else None,
            location_gradient(found, self.coefficients, self.form) if self.moving else None,
        ]


class _SpectralLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, about: Any, *tensors: Tensor) -> Tensor:
        ctx.about, (*fields, count) = about, about
        pieces, coefficients = tensors[:count], tensors[count::2]
        ctx.save_for_backward(x if _reads_x(fields[-1], pieces) else None, weight, *pieces, *coefficients)
        result = F.linear(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            for part in _parts(fields, coefficients, [False] * len(tensors)):
                if part.way == "applied":
                    _add_applied(result.view(-1, result.shape[-1]), part, pieces)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (*fields, count), (x, weight, *tensors) = ctx.about, ctx.saved_tensors
        wants_x, _, wants_bias, _, *wanted = ctx.needs_input_grad
        parts, flat = _parts(fields, tensors[count:], wanted[count:]), grad.reshape(-1, grad.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            features = None if x is None else x.reshape(-1, x.shape[-1])
            spectra, onward = _spectra(features, tuple(tensors[:count]), flat, parts, any(wanted[:count]))
        numbers = [number for part, z in zip(parts, spectra, strict=True) for number in part.gradients(z)]
        return grad @ weight if wants_x else None, None, flat.sum(0) if wants_bias else None, None, *onward[:count], *numbers


def _parts(fields: list[Any], coefficients: Sequence[Tensor], wanted: Sequence[bool]) -> list[_Part]:
    return [_Part(*values) for values in zip(*fields, coefficients, wanted[::2], wanted[1::2], strict=False)]


def _reads_x(ways: list[Strategy], pieces: Pieces) -> bool:
    """Whether the gradient needs x itself."""
    return "whole" in ways or not pieces


def _add_applied(result: Tensor, part: _Part, pieces: Pieces) -> None:
    """Add x Delta W^T to its rows of the result (n, p), rounded to the result's dtype."""
    dtype = pieces[0].dtype
    spectrum = spectrum_of(part.layout, part.scaled(dtype))
    if result.dtype == dtype and not isinstance(part.rows, Tensor):
        add_applied(result[:, part.rows or slice(None)], spectrum, pieces)
        return
    term = torch.zeros(len(result), part.form.shape[0], dtype=dtype, device=result.device)
    add_applied(term, spectrum, pieces)
    result[:, slice(None) if part.rows is None else part.rows] += term.to(result.dtype)


def _spectra(
    x: Tensor | None, pieces: Pieces, grad: Tensor, parts: list[_Part], wants_pieces: bool
) -> tuple[list[dict[Offset, Tensor]], Sequence[Tensor | None]]:
    """The spectrum of each part's gradient where it asks for it, and the gradients of the pieces.

    Args:
        x: (n, q), where it is not its frequencies that are at hand.
        grad: (n, p), with all rows of the weight.
    """
    few = [part for part in parts if part.way != "whole"]
    right = pieces or (in_pieces(x) if few and x is not None else ())
    backs = [part.back(right[0].dtype) if wants_pieces else None for part in few]
    grads, layouts, places = [part.rows_of(grad) for part in few], [part.layout for part in few], [part.offsets for part in few]
    found, onward = spectra_at(right, grads, layouts, places, backs) if few else ([], [])
    remaining = iter(found)
    spectra = [_whole_spectrum(x, grad, part) if part.way == "whole" else next(remaining) for part in parts]
    return spectra, onward or [None] * len(pieces)


def _whole_spectrum(x: Tensor | None, grad: Tensor, part: _Part) -> dict[Offset, Tensor]:
    if not part.offsets or x is None:
        return {}
    whole = part.rows_of(grad).T @ x.to(grad.dtype)
    return spectrum_at(whole.to(part.coefficients.dtype), part.layout, part.offsets)
