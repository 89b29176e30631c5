"""The Haar transform, against its matrix."""

import math

import pytest
import torch

from loca_vision.functional.haar import haar2, inverse_haar2
from support.formulas import haar_matrix

SIZES = range(1, 34)


@pytest.mark.parametrize("size", SIZES)
def test_it_is_orthonormal_and_the_inverse_is_its_transpose(size):
    matrix = haar2(torch.eye(size, dtype=torch.float64)[:, None, :])[:, 0].T  # of a single row: along the other axis only
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    torch.testing.assert_close(matrix, torch.from_numpy(haar_matrix(size)))
    inverse = inverse_haar2(torch.eye(size, dtype=torch.float64)[:, None, :])[:, 0].T
    torch.testing.assert_close(inverse, matrix.T)


@pytest.mark.parametrize("shape", [(1, 1), (4, 7), (3, 2, 16, 5), (33, 1)])
def test_two_axes_are_transformed_one_after_the_other(shape):
    x = torch.randn(*shape, dtype=torch.float64)
    rows, cols = (torch.from_numpy(haar_matrix(size)) for size in shape[-2:])
    torch.testing.assert_close(haar2(x), rows @ x @ cols.T)
    torch.testing.assert_close(inverse_haar2(x), rows.T @ x @ cols)
    torch.testing.assert_close(inverse_haar2(haar2(x)), x)


def test_four_points():
    half, root = 0.5, math.sqrt(0.5)
    known = [[half, half, half, half], [half, half, -half, -half], [root, -root, 0, 0], [0, 0, root, -root]]
    torch.testing.assert_close(haar2(torch.eye(4)[:, None, :])[:, 0].T, torch.tensor(known))


def test_the_last_of_an_odd_number_goes_on_as_it_is():
    root = math.sqrt(0.5)
    average = torch.tensor([root * root, root * root, root])  # of the first two, and then of that and the third
    torch.testing.assert_close(haar2(torch.eye(3)[:, None, :])[:, 0].T[0], average)


@pytest.mark.parametrize("shape", [(1, 1), (5, 4), (2, 3, 7)])
@pytest.mark.parametrize("transform", (haar2, inverse_haar2))
def test_gradients(transform, shape):
    assert torch.autograd.gradcheck(transform, torch.randn(*shape, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_dtype_stays(dtype):
    assert haar2(torch.ones(3, 4, dtype=dtype)).dtype == inverse_haar2(torch.ones(3, 4, dtype=dtype)).dtype == dtype
