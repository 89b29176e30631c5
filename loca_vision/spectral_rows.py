"""A linear map with cosine updates on some of its rows, and their gradients by the cheaper of two ways."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from loca_vision.cosine_sum import spectrum_at
from loca_vision.cosines import Cosines, Form, Layout, Offset, coefficient_gradient, location_gradient, offsets
from loca_vision.paths import Asked, choose
from loca_vision.rows import Rows, as_computed
from loca_vision.token_spectrum import spectra_at

CosineRows = tuple[Rows, Cosines]  # the rows, and what is added to them


def spectral_linear(x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[CosineRows]) -> Tensor:
    """x weight^T + bias, in autocast's dtype where it is on: (..., q) to (..., n).

    `weight` (n, q) already contains the updates and has no gradient; coefficients and locations have theirs: from the gradient
    of their rows or, where `paths` finds that cheaper, from the activations without it.
    """
    rows, cosines = zip(*updates, strict=True)
    numbers = [number for one in cosines for number in (one.coefficients, one.locations)]
    about = rows, tuple(one.form for one in cosines), tuple(one.layout for one in cosines)
    result: Tensor = _SpectralLinear.apply(*as_computed(x, weight, bias), about, *numbers)
    return result


@dataclass(frozen=True)
class _Part:
    """One update while its gradients are found."""

    rows: Rows
    form: Form
    coefficients: Tensor
    layout: Layout
    learned: bool
    moving: bool

    @property
    def offsets(self) -> list[Offset]:
        return offsets(self.form.difference, self.learned, self.moving)

    def rows_of(self, grad: Tensor) -> Tensor:
        return grad if self.rows is None else grad[:, self.rows]

    def gradients(self, z: dict[Offset, Tensor]) -> list[Tensor | None]:
        """Of coefficients and locations."""
        return [
            coefficient_gradient(z, self.form) if self.learned else None,
            location_gradient(z, self.coefficients, self.form) if self.moving else None,
        ]


class _SpectralLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, about: Any, *numbers: Tensor) -> Tensor:
        ctx.about = about
        ctx.save_for_backward(x, weight, *numbers[::2])
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *coefficients = ctx.saved_tensors
        wants_x, _, wants_bias, _, *wanted = ctx.needs_input_grad
        rows, forms, layouts = ctx.about
        fields = (rows, forms, coefficients, layouts, wanted[::2], wanted[1::2])
        parts = [_Part(*values) for values in zip(*fields, strict=True)]
        flat, features = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        spectra = _spectra(features, flat, parts)
        numbers = [number for part, z in zip(parts, spectra, strict=True) for number in part.gradients(z)]
        return grad @ weight if wants_x else None, None, flat.sum(0) if wants_bias else None, None, *numbers


def _spectra(x: Tensor, grad: Tensor, parts: list[_Part]) -> list[dict[Offset, Tensor]]:
    """The spectrum of each part's gradient where it asks for it; x is (n, q), grad (n, p) with all rows of the weight."""
    asked = [Asked(part.form.shape, len(part.layout.cells), len(part.offsets)) for part in parts]
    by_token = [choice.sampled for choice in choose(asked, len(x), x.device, x.dtype)]
    with torch.autocast(x.device.type, enabled=False):
        few = iter(_sampled_spectra(x, grad, [part for part, choice in zip(parts, by_token, strict=True) if choice]))
        return [next(few) if choice else _whole_spectrum(x, grad, part) for part, choice in zip(parts, by_token, strict=True)]


def _whole_spectrum(x: Tensor, grad: Tensor, part: _Part) -> dict[Offset, Tensor]:
    if not part.offsets:
        return {}
    whole = part.rows_of(grad).T @ x.to(grad.dtype)
    return spectrum_at(whole.to(part.coefficients.dtype), part.layout, part.offsets)


def _sampled_spectra(x: Tensor, grad: Tensor, parts: list[_Part]) -> list[dict[Offset, Tensor]]:
    if not parts:
        return []
    grads, layouts = [part.rows_of(grad) for part in parts], [part.layout for part in parts]
    found = spectra_at(x, grads, layouts, [part.offsets for part in parts])
    return [
        {place: values.to(part.coefficients.dtype) for place, values in z.items()} for part, z in zip(parts, found, strict=True)
    ]
