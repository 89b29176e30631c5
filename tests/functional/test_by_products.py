"""Sums of atoms by ordinary products: the values and gradients of the operators they stand in for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loca_vision.functional.by_products import cosine_sum_by_products, inverse_real_by_products
from loca_vision.functional.cosine_atoms import AtomSettings, Cells
from loca_vision.functional.cosine_sum import cosine_sum
from loca_vision.functional.fourier import inverse_real

SHAPES = [(1, 1), (5, 8), (16, 7), (48, 48)]


def numbers(shape: tuple[int, int], dtype: torch.dtype, count: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    coefficients = torch.randn(count, dtype=dtype, requires_grad=True)
    locations = torch.rand(count, 2, dtype=dtype, requires_grad=True)
    sizes = torch.tensor(shape) - 1
    return coefficients, locations, (locations.detach() * sizes).round().long()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("difference", ["central", "forward", "backward"])
def test_values_and_gradients_of_a_cosine_sum(shape: tuple[int, int], difference: str) -> None:
    coefficients, locations, cells = numbers(shape, torch.float64)
    direction = torch.randn(shape, dtype=torch.float64)
    results = []
    for delta in (
        cosine_sum(coefficients, locations, cells, shape, 1.7, difference),
        cosine_sum_by_products(coefficients, locations, cells, AtomSettings(shape, 1.7, difference)),
    ):
        results.append((delta, *torch.autograd.grad((delta * direction).sum(), [coefficients, locations])))
    for operator, products in zip(*results, strict=True):
        torch.testing.assert_close(products, operator, rtol=1e-9, atol=1e-9)


def test_float32_is_as_exact_as_the_operator() -> None:
    """The angles of long transforms are large: reduced in whole numbers, they cost no digits."""
    shape = (1280, 320)
    coefficients, locations, cells = numbers(shape, torch.float32, count=50)
    delta = cosine_sum_by_products(coefficients, locations.detach(), cells, AtomSettings(shape, 1.0, "central"))
    exact = cosine_sum(coefficients.double(), locations.double(), cells, shape, 1.0, "central")
    assert (delta - exact).abs().max() < 2e-6 * exact.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_values_of_an_inverse_fourier_transform(shape: tuple[int, int]) -> None:
    coefficients, _, cells = numbers(shape, torch.float64)
    expected = inverse_real(coefficients, Cells(cells, shape))
    torch.testing.assert_close(inverse_real_by_products(coefficients, cells, shape, 1 / expected.numel()), expected)
