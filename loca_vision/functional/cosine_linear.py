"""A linear map with cosine updates on some of its rows, whose gradients are computed by the cheapest of three strategies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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
from loca_vision.functional.transforms import once_differentiable

CosineRows = tuple[Rows, Cosines]  # the rows, and what is added to them


def workload_of(cosines: Cosines) -> Workload:
    """Return the work that one training step requires."""
    moving, learned = cosines.locations.requires_grad, cosines.coefficients.requires_grad
    wanted = offsets(cosines.settings.difference, learned, moving)
    return Workload(cosines.settings.shape, len(cosines.layout.cells), len(wanted))


def spectral_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[CosineRows], strategies: list[Strategy]
) -> Tensor:
    """Return x weight^T + bias with updates, (..., q) to (..., n), in autocast's dtype if autocast is on.

    `weight` (n, q) gets no gradient, but coefficients and locations do. It contains the updates whose strategy is "whole"
    (their gradient is the transform of the gradient of their rows) or "sampled" (their gradient is computed from the
    activations). It does not contain the "applied" updates, which act on the activations.
    """
    pieces = _pieces_for(x, strategies)
    terms = [_Term(rows, own.settings, own.layout, s) for (rows, own), s in zip(updates, strategies, strict=True)]
    numbers = [number for _, cosines in updates for number in (cosines.coefficients, cosines.locations)]
    plan = _Plan(tuple(terms), len(pieces))
    result: Tensor = _SpectralLinear.apply(*as_computed(x, weight, bias), plan, *pieces, *numbers)
    return result


def _pieces_for(x: Tensor, strategies: list[Strategy]) -> Pieces:
    """Return the frequencies of x, which are kept for the gradient instead of x; empty if x takes less memory than they do."""
    if "applied" in strategies:
        return shared_pieces(x)
    half = x.dtype.itemsize < 4 or torch.is_autocast_enabled(x.device.type)
    return tuple(piece.detach() for piece in shared_pieces(x)) if "sampled" in strategies and not half else ()


@dataclass(frozen=True)
class _Term:
    """The part of one update that autograd does not track."""

    rows: Rows
    settings: AtomSettings
    cells: Cells
    strategy: Strategy

    def rows_of(self, grad: Tensor) -> Tensor:
        return grad if self.rows is None else grad[:, self.rows]

    def scaled(self, coefficients: Tensor, dtype: torch.dtype) -> Tensor:
        return (coefficients * self.settings.scale).to(dtype)


@dataclass(frozen=True)
class _Plan:
    """The updates that take part, and how many of the tensors passed along with them are frequencies of x."""

    terms: tuple[_Term, ...]
    n_pieces: int

    @property
    def reads_x(self) -> bool:
        """Whether the gradient needs x itself."""
        return not self.n_pieces or any(term.strategy == "whole" for term in self.terms)

    def gradients(self, coefficients: Sequence[Tensor], wanted: Sequence[bool]) -> list[_Gradient]:
        """Return the gradient of each update; `wanted` has two flags per update, for its coefficients and its locations."""
        return list(map(_Gradient, self.terms, coefficients, wanted[::2], wanted[1::2]))


@dataclass(frozen=True)
class _Gradient:
    """The gradient of one update while it is computed."""

    term: _Term
    coefficients: Tensor
    learned: bool
    moving: bool

    @property
    def offsets(self) -> list[Offset]:
        return offsets(self.term.settings.difference, self.learned, self.moving)

    def to_input(self, dtype: torch.dtype) -> Tensor | None:
        """Return the sparse matrix that maps the output's gradient to that of the activations, or None if the weight does."""
        if self.term.strategy != "applied":
            return None
        return transposed_of(self.term.cells, self.term.scaled(self.coefficients, dtype))

    def of_numbers(self, z: dict[Offset, Tensor]) -> list[Tensor | None]:
        """Return the gradients of coefficients and locations, given the spectrum at the offsets."""
        values, settings = {offset: value.to(self.coefficients.dtype) for offset, value in z.items()}, self.term.settings
        return [
            coefficient_gradient(values, settings) if self.learned else None,
            location_gradient(values, self.coefficients, settings) if self.moving else None,
        ]


class _SpectralLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan, *tensors: Tensor) -> Tensor:
        pieces, coefficients = tensors[: plan.n_pieces], tensors[plan.n_pieces :: 2]
        ctx.plan = plan
        ctx.save_for_backward(x if plan.reads_x else None, weight, *pieces, *coefficients)
        result = F.linear(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            for term, own in zip(plan.terms, coefficients, strict=True):
                if term.strategy == "applied":
                    _add_applied(result.view(-1, result.shape[-1]), term, own, pieces)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        x, weight, *tensors = ctx.saved_tensors
        wants_x, _, wants_bias, _, *wanted = ctx.needs_input_grad
        pieces, coefficients = tuple(tensors[: plan.n_pieces]), tensors[plan.n_pieces :]
        gradients, flat = plan.gradients(coefficients, wanted[plan.n_pieces :]), grad.reshape(-1, grad.shape[-1])
        with torch.autocast(grad.device.type, enabled=False):
            features = None if x is None else x.reshape(-1, x.shape[-1])
            spectra, of_pieces = _spectra(features, pieces, flat, gradients, any(wanted[: plan.n_pieces]))
        numbers = [number for one, z in zip(gradients, spectra, strict=True) for number in one.of_numbers(z)]
        return grad @ weight if wants_x else None, None, flat.sum(0) if wants_bias else None, None, *of_pieces, *numbers


def _add_applied(result: Tensor, term: _Term, coefficients: Tensor, pieces: Pieces) -> None:
    """Add x Delta W^T, rounded to the result's dtype, to the columns of the result (n, p) that belong to the term's rows."""
    dtype = pieces[0].dtype
    spectrum = spectrum_of(term.cells, term.scaled(coefficients, dtype))
    if result.dtype == dtype and not isinstance(term.rows, Tensor):
        add_applied(result[:, term.rows or slice(None)], spectrum, pieces)
        return
    added = torch.zeros(len(result), term.settings.shape[0], dtype=dtype, device=result.device)
    add_applied(added, spectrum, pieces)
    result[:, slice(None) if term.rows is None else term.rows] += added.to(result.dtype)


def _spectra(
    x: Tensor | None, pieces: Pieces, grad: Tensor, gradients: list[_Gradient], wants_pieces: bool
) -> tuple[list[dict[Offset, Tensor]], Sequence[Tensor | None]]:
    """Return the spectrum of each update's gradient at its offsets, and the gradients of the pieces.

    Args:
        x: (n, q); None if its frequencies are available instead.
        pieces: the frequencies of x, or empty.
        grad: (n, p), for all rows of the weight.
        gradients: the gradients to compute.
        wants_pieces: whether the gradients of the pieces are needed.
    """
    by_token = [one for one in gradients if one.term.strategy != "whole"]
    right = pieces or (in_pieces(x) if by_token and x is not None else ())
    found: list[dict[Offset, Tensor]] = []
    of_pieces: list[Tensor] = []
    if by_token:
        found, of_pieces = spectra_at(
            right,
            [one.term.rows_of(grad) for one in by_token],
            [one.term.cells for one in by_token],
            [one.offsets for one in by_token],
            [one.to_input(right[0].dtype) if wants_pieces else None for one in by_token],
        )
    remaining = iter(found)
    spectra = [_whole_spectrum(x, grad, one) if one.term.strategy == "whole" else next(remaining) for one in gradients]
    return spectra, of_pieces or [None] * len(pieces)


def _whole_spectrum(x: Tensor | None, grad: Tensor, one: _Gradient) -> dict[Offset, Tensor]:
    if not one.offsets or x is None:
        return {}
    whole = one.term.rows_of(grad).T @ x.to(grad.dtype)
    return spectrum_at(whole.to(one.coefficients.dtype), one.term.cells, one.offsets)
