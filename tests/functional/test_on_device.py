"""The operators in the branches of an accelerator, against dense matrices in float64 on the CPU."""

from __future__ import annotations

import pytest
import scipy.fft
import torch
from torch import Tensor

from loca_vision.functional.by_products import cosine_sum_by_products
from loca_vision.functional.cosine_atoms import AtomSettings, Cells
from loca_vision.functional.cosine_sum import cosine_applied, cosine_matrix, cosine_sum, spectrum_at
from loca_vision.functional.dct import dct, idct
from loca_vision.functional.fourier import inverse_real
from loca_vision.functional.haar import haar2, inverse_haar2
from loca_vision.functional.low_rank_linear import low_rank_linear
from loca_vision.functional.packed_dct import add_samples, frequencies
from loca_vision.functional.sparse_products import product, spectrum_of, transposed_of
from support.accelerator import branches, pretended
from support.formulas import cosine_inverse, fourier_inverse, haar_inverse, haar_matrix, spread
from support.tolerance import assert_all_near, assert_near

SHAPES = [(1, 1), (1, 7), (9, 1), (5, 8), (33, 20), (96, 200)]
PRECISIONS = (torch.float64, torch.float32)
STEPS = {"central": ((1, 0.5), (-1, -0.5)), "forward": ((1, 1.0), (0, -1.0)), "backward": ((0, 1.0), (-1, -1.0))}

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
precisions = pytest.mark.parametrize("dtype", PRECISIONS, ids=str)


def make(shape: tuple[int, int], device: torch.device, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients, locations and cells; the first and the last cell are among them, and one of them twice."""
    total = shape[0] * shape[1]
    flat = torch.randint(total, (min(12, 3 * total),))
    flat[0], flat[1:3] = 0, total - 1
    cells = torch.stack([flat // shape[1], flat % shape[1]], 1)
    locations = cells / (torch.tensor(shape) - 1).clamp(min=1)
    return torch.randn(len(flat)).to(device, dtype), locations.to(device, dtype), cells.to(device)


def dense(coefficients: Tensor, cells: Tensor, shape: tuple[int, int]) -> Tensor:
    """The sum of cosines, on the CPU in float64."""
    coefficients, cells = coefficients.detach().cpu(), cells.cpu()
    return cosine_inverse(spread(coefficients, cells[:, 0] * shape[1] + cells[:, 1], shape))


def test_the_stand_in_is_one() -> None:
    """It finds where the library asks for the device, takes the other branch, and goes back."""
    assert any(name.startswith("loca_vision.functional.") for name in branches())
    _, _, cells = make((6, 5), torch.device("cpu"))
    values = torch.randn(12)
    on_cpu = cosine_matrix(values, Cells(cells, (6, 5)), 1.0)
    with pretended():
        elsewhere = cosine_matrix(values, Cells(cells, (6, 5)), 1.0)
        with pretended(False):
            assert torch.equal(cosine_matrix(values, Cells(cells, (6, 5)), 1.0), on_cpu)
    assert torch.equal(cosine_matrix(values, Cells(cells, (6, 5)), 1.0), on_cpu)
    assert_near(elsewhere, on_cpu)


@shapes
@precisions
@pytest.mark.parametrize("difference", STEPS)
def test_a_cosine_sum_and_its_gradients(
    shape: tuple[int, int], dtype: torch.dtype, difference: str, accelerator: torch.device
) -> None:
    """The gradient of a location is the difference of the loss when its component moves by one cell, and no other does."""
    coefficients, locations, cells = make(shape, accelerator, dtype)
    coefficients.requires_grad_(), locations.requires_grad_()
    direction = torch.randn(shape, dtype=torch.float64)
    result = cosine_sum(coefficients, locations, cells, shape, 0.7, difference)
    assert_near(result, 0.7 * dense(coefficients, cells, shape))
    found = torch.autograd.grad(result, (coefficients, locations), direction.to(accelerator, dtype))
    z = exact_dct2(direction)
    ends, own = torch.tensor(shape) - 1, cells.cpu()
    slopes = torch.zeros(len(own), 2, dtype=torch.float64)
    for axis in range(2):
        for step, share in STEPS[difference]:
            moved = own.clone()
            moved[:, axis] = (moved[:, axis] + step).clamp(0, ends[axis])
            slopes[:, axis] += share * ends[axis] * z[tuple(moved.T)]
    wanted = 0.7 * z[tuple(own.T)], 0.7 * coefficients.detach().cpu().double()[:, None] * slopes
    assert_all_near(found, wanted)
    settings = AtomSettings(shape, 0.7, difference)
    again = cosine_sum_by_products(coefficients, locations, cells, settings)
    assert_near(again, result.detach())
    assert_all_near(torch.autograd.grad(again, (coefficients, locations), direction.to(accelerator, dtype)), wanted)


def exact_dct2(matrix: Tensor) -> Tensor:
    return torch.from_numpy(scipy.fft.dctn(matrix.numpy(), norm="ortho"))


@shapes
@precisions
def test_spectra_of_gradients_at_cells(shape: tuple[int, int], dtype: torch.dtype, accelerator: torch.device) -> None:
    _, _, cells = make(shape, accelerator)
    gradient, (rows, cols) = torch.randn(shape), (cells.cpu() + torch.tensor([1, -1])).T
    found = spectrum_at(gradient.to(accelerator, dtype), Cells(cells, shape), [(0, 0), (1, 0), (0, -1)])
    z = exact_dct2(gradient.double())
    last, own = shape[0] - 1, cells.cpu().T
    wanted = [z[own[0], own[1]], z[rows.clamp(max=last), own[1]], z[own[0], cols.clamp(min=0)]]
    assert_all_near(found.values(), wanted)


@shapes
@precisions
@pytest.mark.parametrize("lead", [(), (3,), (2, 5)], ids=str)
def test_a_cosine_sum_applied_to_activations(
    shape: tuple[int, int], dtype: torch.dtype, lead: tuple[int, ...], accelerator: torch.device
) -> None:
    coefficients, _, cells = make(shape, accelerator, dtype)
    x = torch.randn(*lead, shape[1]).to(accelerator, dtype).requires_grad_()
    result = cosine_applied(x, coefficients, cells, shape, 0.7)
    delta = 0.7 * dense(coefficients, cells, shape)
    exact = x.detach().cpu().double()
    assert_near(result, exact @ delta.T)
    direction = torch.randn_like(result)
    (found,) = torch.autograd.grad(result, x, direction)
    assert_near(found, direction.cpu().double() @ delta)


@shapes
@precisions
def test_products_with_sparse_spectra(shape: tuple[int, int], dtype: torch.dtype, accelerator: torch.device) -> None:
    """From samples to samples: what one matrix does, and its transpose."""
    coefficients, _, cells = make(shape, accelerator, dtype)
    layout, delta = Cells(cells, shape), dense(coefficients, cells, shape)
    for spectrum, matrix in ((spectrum_of(layout, coefficients), delta), (transposed_of(layout, coefficients), delta.T)):
        x = torch.randn(10, matrix.shape[1]).to(accelerator, dtype)
        right = frequencies(x)
        once, result = product(spectrum, right), torch.zeros(10, matrix.shape[0], dtype=dtype, device=accelerator)
        add_samples(result, product(spectrum, right, once.clone()))  # twice the term
        assert_near(result, 2 * x.cpu().double() @ matrix.T)


@shapes
@precisions
@pytest.mark.parametrize("norm", ("backward", "ortho"))
def test_an_inverse_fourier_transform(shape: tuple[int, int], dtype: torch.dtype, norm: str, accelerator: torch.device) -> None:
    coefficients, _, cells = make(shape, accelerator, dtype)
    flat, total = (cells[:, 0] * shape[1] + cells[:, 1]).cpu(), shape[0] * shape[1]
    values = coefficients.cpu().double().requires_grad_()
    wanted = fourier_inverse(spread(values, flat, shape)) * (1 if norm == "backward" else total**0.5)
    result = inverse_real(coefficients.requires_grad_(), Cells(cells, shape), norm)
    assert_near(result, wanted)
    direction = torch.randn_like(wanted)
    (found,) = torch.autograd.grad(result, coefficients, direction.to(accelerator, dtype))
    assert_near(found, torch.autograd.grad(wanted, values, direction)[0])


@shapes
@precisions
def test_a_haar_transform(shape: tuple[int, int], dtype: torch.dtype, accelerator: torch.device) -> None:
    x = torch.randn(shape)
    assert_near(inverse_haar2(x.to(accelerator, dtype)), haar_inverse(x.double()))
    rows, cols = (torch.from_numpy(haar_matrix(size)) for size in shape)
    assert_near(haar2(x.to(accelerator, dtype)), rows @ x.double() @ cols.T)


ROWS = {"all": [None], "query and value": [slice(0, 4), slice(8, 12)], "interleaved": [torch.tensor([0, 1, 6, 7])]}


@precisions
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_a_low_rank_linear_map(rows: list, dtype: torch.dtype, accelerator: torch.device) -> None:
    """Values and gradients: autograd has them of the whole weight, in float64 on the CPU."""
    sizes = [(12 if row is None else 4, 5) for row in rows]
    exact = [torch.randn(n, dtype=torch.float64) for size in sizes for n in ((size[0], 2), (2, size[1]))]
    x, weight, bias = (torch.randn(size, dtype=torch.float64) for size in ((2, 7, 5), (12, 5), (12,)))
    mine = [value.to(accelerator, dtype).requires_grad_() for value in (x, bias, *exact)]
    result = low_rank_linear(
        mine[0], weight.to(accelerator, dtype), mine[1], [(row, *mine[2 + 2 * i : 4 + 2 * i]) for i, row in enumerate(rows)]
    )
    leaves = [value.requires_grad_() for value in (x, bias, *exact)]
    whole = weight.clone()
    for i, row in enumerate(rows):
        index = torch.arange(12)[slice(None) if row is None else row]
        whole = whole.index_add(0, index, exact[2 * i] @ exact[2 * i + 1])
    wanted = x @ whole.T + bias
    assert_near(result, wanted)
    direction = torch.randn_like(wanted)
    found = torch.autograd.grad(result, mine, direction.to(accelerator, dtype))
    assert_all_near(found, torch.autograd.grad(wanted, leaves, direction))


@precisions
@pytest.mark.parametrize("method", ("matrix", "fast", "auto"))
@pytest.mark.parametrize("n", (1, 2, 31, 64, 2050))
def test_a_cosine_transform_of_any_length(n: int, method: str, dtype: torch.dtype, accelerator: torch.device) -> None:
    x = torch.randn(3, n)
    found = dct(x.to(accelerator, dtype), method=method)
    assert_near(found, torch.from_numpy(scipy.fft.dct(x.double().numpy(), norm="ortho")))
    assert_near(idct(found, method=method), x)
