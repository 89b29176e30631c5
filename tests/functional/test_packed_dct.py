"""Frequencies in rows, against scipy's transform, and back."""

import pytest
import scipy.fft
import torch

from loca_vision.functional.packed_dct import add_samples, basis_pieces, empty_spectrum, frequencies, packed_rows, rows_for

LENGTHS = (1, 2, 3, 4, 5, 8, 9, 33, 64, 77)


@pytest.fixture(params=(1, 2))
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def dct_of(x):
    return torch.from_numpy(scipy.fft.dct(x.numpy(), type=2, norm="ortho"))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_each_frequency_is_at_its_place(n, dtype, threads):
    x = torch.randn(7, n, dtype=dtype)
    found = frequencies(x)
    assert found.shape == (rows_for(n), 7) and found.is_contiguous() and found.dtype == dtype
    row, sign = packed_rows(torch.arange(n), n)
    assert len(set(row.tolist())) == n
    torch.testing.assert_close((found[row] * sign[:, None].to(dtype)).T, dct_of(x))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_samples_are_added_to_what_is_there(n, dtype, threads):
    x, there = torch.randn(2, 20, n + 3, dtype=dtype)
    x = x[:, :n].contiguous()
    row, sign = packed_rows(torch.arange(n), n)
    spectrum = empty_spectrum(rows_for(n), 20, x).zero_()
    spectrum[row] = sign[:, None].to(dtype) * dct_of(x).T
    y = there.clone()
    add_samples(y[:, 3:], spectrum)
    torch.testing.assert_close(y[:, 3:], there[:, 3:] + x)
    assert torch.equal(y[:, :3], there[:, :3])


@pytest.mark.parametrize("n", LENGTHS)
def test_a_basis_is_the_frequencies_of_unit_vectors(n):
    basis = torch.cat(basis_pieces(n, 10**6, torch.device("cpu"), torch.float64), 1)
    row, _ = packed_rows(torch.arange(n), n)
    torch.testing.assert_close(basis[row], frequencies(torch.eye(n, dtype=torch.float64))[row])


@pytest.mark.parametrize("n", (1, 16, 100, 128, 4096))
def test_columns_do_not_compete_for_the_cache(n):
    made = empty_spectrum(5, n, torch.zeros(1))
    assert made.shape == (5, n) and made.stride(0) >= n and made.stride(0) * 4 % 64 == 0 and made.stride(0) * 4 // 64 % 2
