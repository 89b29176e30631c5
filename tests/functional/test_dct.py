"""The cosine transforms against scipy, and the properties that make LoCA's scale mean the same at every width."""

import numpy as np
import pytest
import scipy.fft
import torch

from loca_vision.functional.dct import dct, dct2, dct_matrix, idct, idct2

LENGTHS = (1, 2, 3, 5, 8, 13, 31, 64, 101)
METHODS = ("matrix", "fast", "auto")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def scipy_dct2(x: torch.Tensor) -> np.ndarray:
    return scipy.fft.dctn(x.double().cpu().numpy(), type=2, norm="ortho", axes=(-2, -1))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", LENGTHS)
@pytest.mark.parametrize("cols", (1, 2, 7, 12))
def test_dct2_is_scipys(rows, cols, dtype, method, device):
    x = torch.randn(rows, cols, dtype=dtype).to(device)
    spectrum = dct2(x, method=method)
    assert spectrum.dtype == dtype
    scale = max(1.0, x.norm().item())
    assert np.abs(spectrum.double().cpu().numpy() - scipy_dct2(x)).max() <= TOLERANCE[dtype] * scale
    assert (idct2(spectrum, method=method) - x).abs().max() <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("shape", [(768, 768), (1280, 320), (3072, 768)])
def test_large_float32_transforms_are_scipys(shape, device):
    x = (torch.randn(shape) / shape[1] ** 0.5).to(device)
    assert np.abs(dct2(x).cpu().numpy() - scipy_dct2(x)).max() < 1e-6


@pytest.mark.parametrize("n", (512, 531, 1030))
@pytest.mark.parametrize("count", (0, 1, 63, 64, 65, 129, 193, 400))
@pytest.mark.parametrize("dim", (0, 1))
def test_pieces_are_the_whole(n, count, dim, device):
    x = torch.randn(*((n, count) if dim == 0 else (count, n)), dtype=torch.float64).to(device)
    for transform in (dct, idct):
        torch.testing.assert_close(transform(x, dim, method="fast"), transform(x, dim, method="matrix"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", (*LENGTHS, 1030))
def test_any_axis_and_any_leading_axes(n, method, device):
    x = torch.randn(2, n, 3, 4, dtype=torch.float64).to(device)
    along = torch.stack([dct(x[:, :, i, :], 1, method=method) for i in range(3)], 2)
    torch.testing.assert_close(dct(x, 1, method=method), along, rtol=0, atol=1e-12)
    torch.testing.assert_close(idct(dct(x, -3, method=method), 1, method=method), x, rtol=0, atol=1e-12)
    torch.testing.assert_close(dct(x[0, :, 0, 0], method=method), dct(x, 1, method=method)[0, :, 0, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("n", "dtype", "bound"), [(768, torch.float32, 2e-7), (4096, torch.float32, 2e-7), (97, torch.float64, 1e-14)]
)
def test_matrix_is_orthonormal(n, dtype, bound):
    """Of the largest, every fifteenth row with every row."""
    matrix, rows = dct_matrix(n, dtype=dtype).double(), torch.arange(0, n, 15 if n > 1000 else 1)
    assert (matrix[rows] @ matrix.T - torch.eye(n, dtype=torch.float64)[rows]).abs().max() < bound


def test_matrix_belongs_to_the_caller():
    dct_matrix(5).zero_()
    assert dct_matrix(5).abs().sum() > 0


@pytest.mark.parametrize("method", ("matrix", "fast"))
def test_transforms_are_differentiable(method, device):
    x = torch.randn(5, 6, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dct2(x, method=method), x)
    assert torch.autograd.gradcheck(lambda x: idct2(x, method=method), x)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_rounded_once(dtype, device):
    x = torch.randn(20, 30).to(device, dtype)
    assert torch.equal(dct2(x, method="matrix"), dct(dct(x.float(), -1).to(dtype), -2))
    assert dct2(x).dtype == dtype


def test_matrices_made_in_inference_mode_serve_training_afterwards():
    with torch.inference_mode():
        dct2(torch.randn(37, 41))
    x = torch.randn(37, 41, requires_grad=True)
    dct2(x).square().sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), rtol=1e-4, atol=1e-5)
