"""The update of LoCA and its gradients: Delta W = alpha * C^T S(a, l) D (LoCA, Eq. 1 to 5).

Forward and backward are custom operators (`torch.library`), so that autograd, autocast and `torch.compile` see a single step
with known derivatives: exact for the coefficients, finite differences for the locations, which are integers here.
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loca_vision.functional.batch_tables import BatchCells
from loca_vision.functional.by_products import cosine_sum_by_products
from loca_vision.functional.cosine_atoms import (
    AtomSettings,
    Cells,
    Offset,
    coefficient_gradient,
    location_gradient,
    offsets,
    shifted,
)
from loca_vision.functional.cosine_batch import CosineBatch, batch_of
from loca_vision.functional.cost_model import Workload, reads_whole_spectrum
from loca_vision.functional.dct import dct2
from loca_vision.functional.packed_dct import basis_pieces
from loca_vision.functional.sparse_products import Sums, read_at, spectrum_of, transposed_of
from loca_vision.functional.token_spectra import Pieces, add_applied, in_pieces
from loca_vision.functional.transforms import functional_only


def cosine_sum(
    coefficients: Tensor, locations: Tensor, cells: Tensor, shape: tuple[int, int], scale: float, difference: str
) -> Tensor:
    """Return scale * sum_k a_k C[u_k]^T D[v_k], the inverse 2-D DCT of a sparse spectrum; components at the same cell add up.

    Args:
        coefficients: (B,) float32 or float64, the amplitudes a.
        locations: (B, 2) in [0, 1], which were rounded to `cells`. Only their gradient matters: the change of the loss if one
            component moved by one cell, times the number of cells from 0 to 1 (Eq. 4 and 5).
        cells: (B, 2) int64, row u in [0, p - 1] and column v in [0, q - 1].
        shape: (p, q) of the result.
        scale: alpha.
        difference: how dL/du is estimated from neighbouring cells: "central", "forward" or "backward". Cells beyond the border
            are replaced with the border cell, which makes a central difference half a one-sided one there.

    Returns:
        (p, q) tensor of the coefficients' dtype.
    """
    if functional_only():
        return cosine_sum_by_products(coefficients, locations, cells, AtomSettings(shape, scale, difference))
    delta: Tensor = _cosine_sum(coefficients, locations, cells, shape[0], shape[1], scale, difference)
    return delta


@torch.library.custom_op("loca_vision::cosine_sum", mutates_args=())
def _cosine_sum(
    coefficients: Tensor, locations: Tensor, cells: Tensor, rows: int, cols: int, scale: float, difference: str
) -> Tensor:
    return cosine_matrix(coefficients, Cells(cells, (rows, cols)), scale)


def cosine_matrix(coefficients: Tensor, layout: Cells, scale: float) -> Tensor:
    """Compute `cosine_sum` without gradients, reusing what is cached in the layout."""
    with torch.autocast(coefficients.device.type, enabled=False):
        if coefficients.device.type == "cpu":
            result = coefficients.new_zeros(layout.shape)
            add_cosines(result, coefficients, layout, scale)
            return result
        return _alone(coefficients, layout.cells, AtomSettings(layout.shape, scale, "central")).matrices()[0]


def add_cosines(weight: Tensor, coefficients: Tensor, layout: Cells, scale: float) -> None:
    """Add `cosine_sum` to a weight (p, q) of the same dtype, in place: row i is the update applied to unit vector i."""
    rows, cols = layout.shape
    spectrum = transposed_of(layout, coefficients * scale)
    units = basis_pieces(rows, cols, weight.device, weight.dtype)
    add_applied(weight, spectrum, units)


@torch.library.custom_op("loca_vision::cosine_sum_backward", mutates_args=())
def _cosine_sum_backward(
    grad: Tensor, coefficients: Tensor, cells: Tensor, scale: float, difference: str, moving: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of coefficients (B,) and, if `moving`, of locations (B, 2), or else an empty tensor.

    Both come from one Z = C G D^T.
    """
    with torch.autocast(grad.device.type, enabled=False):
        settings = AtomSettings((grad.shape[0], grad.shape[1]), scale, difference)
        if grad.device.type != "cpu":
            own, slopes = _alone(coefficients, cells, settings).gradients([grad], True, moving)
            nothing = grad.new_empty(0)
            return nothing if own is None else own, nothing if slopes is None else slopes
        z = spectrum_at(grad, Cells(cells, settings.shape), offsets(difference, True, moving))
        slopes = location_gradient(z, coefficients, settings) if moving else grad.new_empty(0)
        return coefficient_gradient(z, settings), slopes


@_cosine_sum.register_fake
def _(coefficients, locations, cells, rows, cols, scale, difference):  # type: ignore[no-untyped-def]
    return coefficients.new_empty(rows, cols)


@_cosine_sum_backward.register_fake
def _(grad, coefficients, cells, scale, difference, moving):  # type: ignore[no-untyped-def]
    return torch.empty_like(coefficients), grad.new_empty(cells.shape if moving else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    coefficients, _, cells, _, _, ctx.scale, ctx.difference = inputs
    ctx.save_for_backward(coefficients, cells)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    coefficients, cells = ctx.saved_tensors
    learned, moving = ctx.needs_input_grad[:2]
    grads = _cosine_sum_backward(grad, coefficients, cells, ctx.scale, ctx.difference, moving)
    return (grads[0] if learned else None, grads[1] if moving else None, None, None, None, None, None)


_cosine_sum.register_autograd(_backward, setup_context=_save)


def cosine_applied(x: Tensor, coefficients: Tensor, cells: Tensor, shape: tuple[int, int], scale: float) -> Tensor:
    """Apply the update to activations without building it: x (C^T S D)^T scale = iDCT(scale * S DCT(x)).

    This costs two transforms of the activations and 2 B multiplications for each of their vectors.

    Args:
        x: (..., q) activations, in any floating-point dtype; the computation is at least in float32.
        coefficients, cells, shape, scale: as in `cosine_sum`.

    Returns:
        (..., p) in x's dtype, differentiable in x.
    """
    if functional_only():
        settings = AtomSettings(shape, scale, "central")
        delta = cosine_sum_by_products(coefficients, torch.zeros_like(cells, dtype=coefficients.dtype), cells, settings)
        return F.linear(x, delta.to(x.dtype))
    applied: Tensor = _cosine_applied(x, coefficients, cells, shape[0], shape[1], scale)
    return applied


@torch.library.custom_op("loca_vision::cosine_applied", mutates_args=())
def _cosine_applied(x: Tensor, coefficients: Tensor, cells: Tensor, rows: int, cols: int, scale: float) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return applied_to(in_pieces(x.reshape(-1, cols)), x, coefficients, Cells(cells, (rows, cols)), scale)


def applied_to(right: Pieces, x: Tensor, coefficients: Tensor, layout: Cells, scale: float) -> Tensor:
    """Compute `cosine_applied` without gradients from the frequencies of x, reusing what is cached in the layout."""
    dtype, rows = right[0].dtype, layout.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        result = torch.zeros(x.numel() // layout.shape[1], rows, dtype=dtype, device=x.device)
        add_applied(result, spectrum_of(layout, (coefficients * scale).to(dtype)), right)
        return result.to(x.dtype).view(*x.shape[:-1], rows)


@_cosine_applied.register_fake
def _(x, coefficients, cells, rows, cols, scale):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], rows)


def _save_applied(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, coefficients, cells, ctx.rows, ctx.cols, ctx.scale = inputs
    ctx.save_for_backward(coefficients, cells)


def _backward_applied(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    coefficients, cells = ctx.saved_tensors  # the transpose of an update is the update of the transposed spectrum
    grad_x = _cosine_applied(grad, coefficients, cells.flip(1), ctx.cols, ctx.rows, ctx.scale)
    return (grad_x, None, None, None, None, None)


_cosine_applied.register_autograd(_backward_applied, setup_context=_save_applied)


def spectrum_at(grad: Tensor, layout: Cells, offsets: list[Offset]) -> dict[Offset, Tensor]:
    """Return Z = C G D^T of a gradient G (p, q) at cells (B, 2) and their neighbours: (B,) for each offset."""
    if grad.device.type != "cpu":  # accelerators are best at matrix products
        z = dct2(grad)
        return {offset: z[tuple(shifted(layout.cells, offset, layout.shape).T)] for offset in offsets}
    right = in_pieces(grad, threads=1)  # in the same pieces as the unit vectors
    if reads_whole_spectrum(Workload(layout.shape, len(layout.cells), len(offsets))):
        z = torch.cat(in_pieces(torch.cat(right, 1)), 1)
        return {offset: read_at(z, layout, offset) for offset in offsets}
    sums = {offset: Sums(layout, offset, grad.dtype) for offset in offsets}
    for units, piece in zip(basis_pieces(*layout.shape, grad.device, grad.dtype), right, strict=True):
        for values in sums.values():
            values.add(units, piece)
    return {offset: values.values() for offset, values in sums.items()}


def _alone(coefficients: Tensor, cells: Tensor, settings: AtomSettings) -> CosineBatch:
    """Return a batch of a single sum, the form used on accelerators, which large products suit best."""
    return batch_of(coefficients, BatchCells(cells, [len(cells)], settings.shape), settings, coefficients.dtype)


with warnings.catch_warnings():  # torch warns once that sparse CSR is in beta: trigger the warning here, where it is ignored
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 1], [0], [1.0], (1, 1), device="cpu")
