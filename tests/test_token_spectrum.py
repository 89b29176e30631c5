"""The gradient's spectrum from activations, against the transform of the whole gradient."""

import pytest
import torch

import loca_vision.paths as paths
from loca_vision.cosines import Layout, shifted
from loca_vision.dct import dct2
from loca_vision.token_spectrum import spectra_at

SIZES = [(1, 1, 1), (1, 5, 3), (7, 1, 6), (9, 6, 1), (40, 8, 8), (33, 13, 20), (100, 31, 64), (70, 530, 18)]


def every_cell(rows, cols):
    return torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).view(-1, 2)


def at_cells(x, grad, cells):
    ((found,),) = (z.values() for z in spectra_at(x, [grad], [Layout(cells, (grad.shape[1], x.shape[1]))], [[(0, 0)]]))
    return found


def factors(tokens, rows, cols, dtype=torch.float64):
    return torch.randn(tokens, cols, dtype=dtype), torch.randn(tokens, rows, dtype=dtype)


@pytest.mark.parametrize(("tokens", "rows", "cols"), SIZES)
@pytest.mark.parametrize("count", ("one", "some", "all"))
def test_values_are_those_of_the_whole_gradient(tokens, rows, cols, count, monkeypatch):
    monkeypatch.setattr(paths, "_NUMBERS_AT_ONCE", 1)  # pieces of 32 tokens, and a rest
    x, grad = factors(tokens, rows, cols)
    cells = every_cell(rows, cols)
    cells = cells[torch.randperm(len(cells))][: {"one": 1, "some": 1 + len(cells) // 3, "all": None}[count]]
    found = at_cells(x, grad, cells)
    torch.testing.assert_close(found, dct2(grad.T @ x)[tuple(cells.T)], rtol=1e-12, atol=1e-12)


def test_several_gradients_share_the_activations_and_may_ask_beside_their_cells():
    x, first = factors(50, 6, 9)
    second = torch.randn(50, 11, dtype=torch.float64)
    layouts = [
        Layout(every_cell(6, 9), (6, 9)),
        Layout(torch.tensor([[2, 3], [2, 3]]), (6, 9)),
        Layout(every_cell(11, 9), (11, 9)),
    ]
    places = [[(0, 0), (1, 0), (0, -1)], [], [(-1, 0)]]
    found = spectra_at(x, [first, first, second], layouts, places)
    assert [list(z) for z in found] == places
    for grad, layout, z in zip((first, first, second), layouts, found, strict=True):
        for place, values in z.items():
            cells = shifted(layout.cells, place, layout.shape)
            torch.testing.assert_close(values, dct2(grad.T @ x)[tuple(cells.T)], rtol=1e-12, atol=1e-12)


def test_columns_of_a_wider_gradient_need_no_copy():
    x, wide = factors(40, 24, 9)
    found = at_cells(x, wide[:, 8:16], every_cell(8, 9))
    torch.testing.assert_close(found, dct2(wide[:, 8:16].T @ x).flatten(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_half_precision_is_summed_in_float32(dtype):
    x, grad = (value.to(dtype) for value in factors(200, 12, 10))
    found = at_cells(x, grad, every_cell(12, 10))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), dct2(grad.double().T @ x.double()).flatten(), rtol=1e-4, atol=1e-4)
