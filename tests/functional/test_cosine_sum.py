"""The update and its gradients against the sum of cosines, the dense form, gradcheck and finite differences."""

import math

import pytest
import torch

import loca_vision.functional.cosine_sum as module
import loca_vision.functional.cost_model as paths
from loca_vision.functional.cosine_sum import cosine_sum
from loca_vision.functional.dct import dct2, dct_matrix

SHAPES = [(6, 6, 5), (5, 8, 3), (1, 7, 3), (9, 1, 4), (1, 1, 1), (4, 3, 12), (33, 20, 40), (530, 40, 30), (600, 500, 70)]
SHAPES += [(1030, 200, 50)]  # the last three by fast transforms, of several pieces
SCALE = 0.7


def make(rows, cols, count, device="cpu", *, collide=True):
    """Coefficients, locations at cell centres, and their cells; with borders, and two components at one cell."""
    flat = torch.randint(rows * cols, (count,))
    flat[0], flat[-1] = 0, rows * cols - 1
    if collide and count > 2:
        flat[1] = flat[2]
    cells = torch.stack([flat // cols, flat % cols], 1)
    locations = cells.double() / torch.tensor([max(rows - 1, 1), max(cols - 1, 1)])
    return torch.randn(count, dtype=torch.float64).to(device), locations.to(device), cells.to(device)


def dense(coefficients, cells, shape):
    """The same update through a dense spectrum and two matrix products."""
    spectrum = coefficients.new_zeros(shape).index_put(tuple(cells.T), coefficients, accumulate=True)
    rows, cols = (dct_matrix(n, dtype=coefficients.dtype, device=coefficients.device) for n in shape)
    return SCALE * rows.T @ spectrum @ cols


def test_update_is_the_sum_of_cosines(device):
    rows, cols = 5, 4
    coefficients, locations, cells = make(rows, cols, 6, device)
    update = cosine_sum(coefficients, locations, cells, (rows, cols), SCALE, "central")
    for i in range(rows):
        for j in range(cols):
            total = 0.0
            for a, (u, v) in zip(coefficients.tolist(), cells.tolist(), strict=True):
                norms = math.sqrt((1 if u == 0 else 2) / rows) * math.sqrt((1 if v == 0 else 2) / cols)
                waves = math.cos(math.pi * (2 * i + 1) * u / (2 * rows)) * math.cos(math.pi * (2 * j + 1) * v / (2 * cols))
                total += a * norms * waves
            assert update[i, j].item() == pytest.approx(SCALE * total, abs=1e-13)


@pytest.mark.parametrize(("rows", "cols", "count"), SHAPES)
@pytest.mark.parametrize("sample_cost", (0, 10**9), ids=("sampled", "whole spectrum"))
def test_update_and_coefficient_gradient_are_those_of_the_dense_form(rows, cols, count, sample_cost, monkeypatch, device):
    monkeypatch.setattr(paths, "_SAMPLE_COST", sample_cost)
    coefficients, locations, cells = make(rows, cols, count, device)
    coefficients.requires_grad_()
    update = cosine_sum(coefficients, locations, cells, (rows, cols), SCALE, "central")
    reference = dense(coefficients, cells, (rows, cols))
    torch.testing.assert_close(update, reference, rtol=0, atol=1e-12)
    weight = torch.randn(rows, cols, dtype=torch.float64, device=device)
    (mine,) = torch.autograd.grad((update * weight).sum(), coefficients)
    (theirs,) = torch.autograd.grad((reference * weight).sum(), coefficients)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("rows", "cols", "count"), SHAPES[:6])
def test_coefficient_gradcheck(rows, cols, count, device):
    coefficients, locations, cells = make(rows, cols, count, device)
    torch.autograd.gradcheck(
        lambda a: cosine_sum(a, locations, cells, (rows, cols), SCALE, "central"), coefficients.requires_grad_()
    )


OFFSETS = {"central": ((1, 0.5), (-1, -0.5)), "forward": ((1, 1.0), (0, -1.0)), "backward": ((0, 1.0), (-1, -1.0))}


@pytest.mark.parametrize("difference", OFFSETS)
@pytest.mark.parametrize(("rows", "cols", "count"), SHAPES[:7])
def test_location_gradient_is_the_brute_force_difference(rows, cols, count, difference, device):
    """Move one component by one cell at a time in the loss <G, Delta W>; a step over the border stays at the border."""
    coefficients, locations, cells = make(rows, cols, count, device)
    weight = torch.randn(rows, cols, dtype=torch.float64, device=device)
    locations.requires_grad_()
    (cosine_sum(coefficients, locations, cells, (rows, cols), SCALE, difference) * weight).sum().backward()

    expected = torch.zeros_like(locations)
    for k in range(count):
        for axis, size in enumerate((rows, cols)):
            for offset, share in OFFSETS[difference]:
                moved = cells.clone()
                moved[k, axis] = (moved[k, axis] + offset).clamp(0, size - 1)
                loss = (dense(coefficients, moved, (rows, cols)) * weight).sum()
                expected[k, axis] += share * loss * (size - 1)
    torch.testing.assert_close(locations.grad, expected.detach(), rtol=1e-9, atol=1e-10)


def test_gradients_come_from_one_transform_of_the_gradient():
    coefficients, locations, cells = make(8, 9, 10)
    weight = torch.randn(8, 9, dtype=torch.float64)
    coefficients.requires_grad_()
    (cosine_sum(coefficients, locations, cells, (8, 9), SCALE, "central") * weight).sum().backward()
    torch.testing.assert_close(coefficients.grad, SCALE * dct2(weight)[tuple(cells.T)], rtol=0, atol=1e-13)


def test_colliding_components_add_and_share_their_gradient():
    cells = torch.tensor([[2, 3], [2, 3]])
    locations = torch.zeros(2, 2)
    coefficients = torch.tensor([1.5, -0.5], requires_grad=True)
    update = cosine_sum(coefficients, locations, cells, (4, 5), 1.0, "central")
    alone = cosine_sum(torch.ones(1), locations[:1], cells[:1], (4, 5), 1.0, "central")
    torch.testing.assert_close(update, alone)
    update.sum().backward()
    assert coefficients.grad[0] == coefficients.grad[1]


def test_a_half_without_need_of_a_gradient_gets_none():
    coefficients, locations, cells = make(6, 6, 5)
    locations.requires_grad_()
    cosine_sum(coefficients, locations, cells, (6, 6), 1.0, "central").sum().backward()
    assert coefficients.grad is None
    assert locations.grad is not None


def test_autocast_does_not_round_the_update(device):
    coefficients, locations, cells = make(40, 40, 9, device)
    arguments = (coefficients.float(), locations.float(), cells, (40, 40), 1.0, "central")
    with torch.autocast(device.type, dtype=torch.bfloat16):
        update = cosine_sum(*arguments)
    assert torch.equal(update, cosine_sum(*arguments))


@pytest.mark.parametrize("difference", OFFSETS)
def test_operator_is_sound_for_compilers(difference):
    coefficients, locations, cells = make(6, 8, 5)
    arguments = (coefficients.requires_grad_(), locations.requires_grad_(), cells, 6, 8, SCALE, difference)
    torch.library.opcheck(
        module._cosine_sum, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )
