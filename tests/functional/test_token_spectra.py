"""Spectra of gradients from activations, against the transform of the dense gradient; shared frequencies."""

import gc

import pytest
import torch
from torch.nn import functional as F

import loca_vision.functional.packed_dct as frequencies
from loca_vision.functional import token_spectra as token_spectrum
from loca_vision.functional.cosine_atoms import Cells, shifted
from loca_vision.functional.dct import dct2
from loca_vision.functional.token_spectra import in_pieces, shared_pieces, spectra_at

SIZES = [(1, 1, 1), (1, 5, 3), (7, 1, 6), (9, 6, 1), (40, 8, 8), (33, 13, 20), (100, 31, 64), (70, 530, 18)]


def every_cell(rows, cols):
    return torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).view(-1, 2)


def at_cells(x, grad, cells):
    (z,), onward = spectra_at(in_pieces(x), [grad], [Cells(cells, (grad.shape[1], x.shape[1]))], [[(0, 0)]], [None])
    assert not onward
    return z[0, 0]


def factors(tokens, rows, cols, dtype=torch.float64):
    return torch.randn(tokens, cols, dtype=dtype), torch.randn(tokens, rows, dtype=dtype)


@pytest.mark.parametrize(("tokens", "rows", "cols"), SIZES)
@pytest.mark.parametrize("count", ("one", "some", "all"))
def test_values_are_those_of_the_whole_gradient(tokens, rows, cols, count, monkeypatch):
    monkeypatch.setattr(frequencies, "_NUMBERS_AT_ONCE", 1)  # pieces of 32 tokens, and a rest
    x, grad = factors(tokens, rows, cols)
    cells = every_cell(rows, cols)
    cells = cells[torch.randperm(len(cells))][: {"one": 1, "some": 1 + len(cells) // 3, "all": None}[count]]
    found = at_cells(x, grad, cells)
    torch.testing.assert_close(found, dct2(grad.T @ x)[tuple(cells.T)], rtol=1e-12, atol=1e-12)


def test_several_gradients_share_the_activations_and_may_ask_for_shifted_cells():
    x, first = factors(50, 6, 9)
    second = torch.randn(50, 11, dtype=torch.float64)
    layouts = [
        Cells(every_cell(6, 9), (6, 9)),
        Cells(torch.tensor([[2, 3], [2, 3]]), (6, 9)),
        Cells(every_cell(11, 9), (11, 9)),
    ]
    places = [[(0, 0), (1, 0), (0, -1)], [], [(-1, 0)]]
    found, _ = spectra_at(in_pieces(x), [first, first, second], layouts, places, [None] * 3)
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


@pytest.fixture
def counted(monkeypatch):
    """How often activations were transformed."""
    calls, real = [], token_spectrum.in_pieces
    monkeypatch.setattr(token_spectrum, "in_pieces", lambda x: calls.append(x.shape) or real(x))
    return calls


def test_whoever_asks_with_the_same_tensor_shares_its_frequencies(counted):
    x = torch.randn(2, 20, 9)
    first, second = shared_pieces(x), shared_pieces(x)
    assert first is second and counted == [(40, 9)]
    torch.testing.assert_close(first, in_pieces(x.view(40, 9)), rtol=0, atol=0)
    shared_pieces(x.clone())
    assert len(counted) == 2


def test_a_tensor_that_changes_is_transformed_again(counted):
    x = torch.randn(20, 9)
    shared_pieces(x)
    x.mul_(2)
    torch.testing.assert_close(shared_pieces(x), in_pieces(x), rtol=0, atol=0)
    assert len(counted) == 2


@pytest.mark.parametrize("leaf", (True, False))
def test_gradients_reach_activations_through_shared_frequencies(leaf, counted):
    """They are asked for twice; an orthonormal transform keeps dot products."""
    start = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    x = start if leaf else start * 1
    direction = torch.randn(30, 8, dtype=torch.float64)
    ways = in_pieces(direction)
    loss = sum((piece * way).sum() for _ in range(2) for piece, way in zip(shared_pieces(x), ways, strict=True))
    loss = loss - 2 * sum(
        (piece[-1] * way[-1]).sum() for piece, way in zip(shared_pieces(x), ways, strict=True)
    )  # n / 2, again
    loss.backward()
    torch.testing.assert_close(start.grad, 2 * direction)
    assert len(counted) == (3 if leaf else 1)


def test_asking_without_gradients_first_does_not_cut_them_off():
    x = torch.randn(30, 8, requires_grad=True) * 1
    with torch.no_grad():
        assert not shared_pieces(x)[0].requires_grad
    assert shared_pieces(x)[0].requires_grad


def test_nothing_is_kept_longer_than_the_tensor():
    before = len(token_spectrum._known)
    start = torch.randn(30, 8, requires_grad=True)
    x = F.gelu(start)
    shared_pieces(x)
    assert len(token_spectrum._known) == before + 1
    loss = sum(piece.sum() for piece in shared_pieces(x))
    del x
    loss.backward()
    del loss
    gc.collect()
    assert len(token_spectrum._known) == before


def test_inference_tensors_have_no_version_and_are_not_kept(counted):
    with torch.inference_mode():
        x = torch.randn(20, 9)
        shared_pieces(x)
        shared_pieces(x)
    assert len(counted) == 2
