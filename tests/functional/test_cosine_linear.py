"""A linear map with cosine updates of its rows, against dense matrices and autograd."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import loca_vision.functional.cost_model as paths
from loca_vision import LoCAConfig, adapters, inject
from loca_vision.functional import token_spectra as token_spectrum
from loca_vision.functional.cosine_atoms import AtomSettings, Cells, Cosines
from loca_vision.functional.cosine_linear import spectral_linear
from loca_vision.functional.cosine_sum import cosine_sum
from loca_vision.functional.dct import dct_matrix
from support import pipelines as tiny
from support.strategies import FORCED
from support.timm_models import randomise

SIZES = [(1, 1, 1, 1), (3, 1, 6, 2), (40, 7, 1, 7), (50, 6, 5, 30), (33, 13, 20, 9), (90, 24, 16, 1), (20, 530, 12, 40)]
SLOPES = {"central": (1, -1, 0.5), "forward": (1, 0, 1.0), "backward": (0, -1, 1.0)}


@pytest.fixture(params=FORCED)
def path(request, monkeypatch):
    monkeypatch.setattr(paths, "COSTS", FORCED[request.param])
    return request.param


def make(rows, cols, count, difference="central", dtype=torch.float64, scale=0.7, device="cpu"):
    """A sum of cosines at random cells, two of them at one, with both halves learning."""
    flat = torch.randperm(rows * cols)[:count]
    if count > 2:
        flat[1] = flat[2]
    cells = torch.stack([flat // cols, flat % cols], 1)
    locations = (cells / torch.tensor([max(rows - 1, 1), max(cols - 1, 1)])).to(device, dtype).requires_grad_()
    coefficients, cells = torch.randn(count, dtype=dtype).to(device).requires_grad_(), cells.to(device)
    return Cosines(coefficients, locations, Cells(cells, (rows, cols)), AtomSettings((rows, cols), scale, difference))


def delta(one):
    form = one.settings
    made = cosine_sum(one.coefficients, one.locations, one.layout.cells, form.shape, form.scale, form.difference)
    return made.detach()


def numbers(updates):
    return [number for _, one in updates for number in (one.coefficients, one.locations)]


def computed(x, base, bias, updates, path):
    weight = base.clone()
    for rows, one in updates if path != "applied" else ():
        weight[slice(None) if rows is None else rows] += delta(one)
    return spectral_linear(x, weight, bias, updates, [path] * len(updates))


def from_spectrum(z, one):
    """The gradients of coefficients and locations by their definition, from the whole of Z."""
    u, v = one.layout.cells.T
    (rows, cols), scale, (up, down, share) = one.settings.shape, one.settings.scale, SLOPES[one.settings.difference]

    def at(du, dv):
        return z[(u + du).clamp(0, rows - 1), (v + dv).clamp(0, cols - 1)]

    slopes = [(rows - 1) * share * (at(up, 0) - at(down, 0)), (cols - 1) * share * (at(0, up) - at(0, down))]
    return scale * at(0, 0), scale * one.coefficients.detach()[:, None] * torch.stack(slopes, 1)


@pytest.mark.parametrize("difference", SLOPES)
@pytest.mark.parametrize(("tokens", "rows", "cols", "count"), SIZES)
def test_gradients_are_those_of_the_dense_form(path, tokens, rows, cols, count, difference, device):
    one = make(rows, cols, count, difference, device=device)
    x, direction = (torch.randn(tokens, n, dtype=torch.float64).to(device) for n in (cols, rows))
    c, d = (dct_matrix(n, dtype=torch.float64, device=device) for n in (rows, cols))
    y = computed(x, torch.randn(rows, cols).to(device, torch.float64), None, [(None, one)], path)
    found = torch.autograd.grad(y, numbers([(None, one)]), direction)
    for mine, dense in zip(found, from_spectrum(c @ direction.T @ x @ d.T, one), strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("learned", "moving"), list(itertools.product((True, False), repeat=2)))
def test_what_learns_gets_a_gradient_and_nothing_else_does(path, learned, moving):
    still, one = make(8, 6, 10), make(8, 6, 10)
    still.locations.requires_grad_(False)
    one.coefficients.requires_grad_(learned)
    one.locations.requires_grad_(moving)
    x = torch.randn(40, 6).double()
    updates = [(slice(0, 8), still), (slice(8, 16), one)]
    computed(x, torch.randn(16, 6).double(), None, updates, path).square().sum().backward()
    assert still.coefficients.grad is not None and still.locations.grad is None and x.grad is None
    assert (one.coefficients.grad is not None, one.locations.grad is not None) == (learned, moving)


ROWS = {
    "all": [None],
    "query and value": [slice(0, 4), slice(8, 12)],
    "interleaved": [torch.tensor([0, 1, 6, 7]), torch.tensor([4, 5, 10, 11])],
    "twice the same": [slice(2, 6), slice(2, 6)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 30)])
def test_rows_and_the_gradients_of_input_and_bias(path, rows, lead, device):
    updates = [(r, make(12 if r is None else 4, 5, 6, device=device)) for r in rows]
    base, bias, x = (torch.randn(size, dtype=torch.float64).to(device) for size in ((12, 5), (12,), (*lead, 5)))
    bias.requires_grad_(), x.requires_grad_()
    weight = base.clone()
    for r, one in updates:
        weight[slice(None) if r is None else r] += delta(one)
    weight.requires_grad_()
    mine = computed(x, base, bias, updates, path)
    dense = F.linear(x, weight, bias)
    torch.testing.assert_close(mine, dense)
    assert path == "applied" or torch.equal(mine, dense)
    direction = torch.randn_like(mine)
    *found, x_grad, bias_grad = torch.autograd.grad(mine, [*numbers(updates), x, bias], direction)
    x_dense, bias_dense, weight_grad = torch.autograd.grad(dense, [x, bias, weight], direction)
    torch.testing.assert_close((x_grad, bias_grad), (x_dense, bias_dense))
    for i, (r, one) in enumerate(updates):
        part = weight_grad[slice(None) if r is None else r]
        c, d = (dct_matrix(n, dtype=torch.float64, device=device) for n in part.shape)
        for got, dense_grad in zip(found[2 * i : 2 * i + 2], from_spectrum(c @ part @ d.T, one), strict=True):
            torch.testing.assert_close(got, dense_grad, rtol=1e-10, atol=1e-10)


def test_gradients_of_parts_of_a_batch_add_up_and_checkpoints_change_nothing(path):
    one = make(9, 7, 12)
    x, base = torch.randn(60, 7).double(), torch.randn(9, 7).double()

    def loss(some, run=lambda f, x: f(x)):
        return run(lambda x: computed(x, base, None, [(None, one)], path), some).square().sum()

    together = torch.autograd.grad(loss(x), numbers([(None, one)]))
    parts = [torch.autograd.grad(loss(some), numbers([(None, one)])) for some in x.split(20)]
    again = torch.autograd.grad(loss(x, lambda f, x: checkpoint(f, x, use_reentrant=False)), numbers([(None, one)]))
    for whole, few, kept in zip(together, zip(*parts, strict=True), again, strict=True):
        torch.testing.assert_close(sum(few), whole, rtol=1e-10, atol=1e-10)
        assert torch.equal(kept, whole)


def test_under_autocast_the_product_is_in_its_dtype_and_gradients_are_not(path, device):
    one = make(16, 12, 20, dtype=torch.float32, device=device)
    x, base = torch.randn(64, 12).to(device), torch.randn(16, 12).to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = computed(x, base, None, [(None, one)], path)
    assert y.dtype == torch.bfloat16
    direction = torch.randn_like(y)
    found = torch.autograd.grad(y, numbers([(None, one)]), direction)
    c, d = (dct_matrix(n, device=device) for n in (16, 12))
    z = c @ (direction.float().T @ x.bfloat16().float()) @ d.T
    for mine, dense in zip(found, from_spectrum(z, one), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, dense, rtol=0.02, atol=0.02 * dense.abs().max().item())


@pytest.mark.parametrize("size", [(200, 96, 96, 300), (400, 64, 200, 12800)])
def test_in_float32_both_ways_are_as_exact(size, path, device):
    tokens, rows, cols, count = size
    one = make(rows, cols, count, dtype=torch.float32, device=device)
    x, direction, base = (torch.randn(size).to(device) for size in ((tokens, cols), (tokens, rows), (rows, cols)))
    found = torch.autograd.grad(computed(x, base, None, [(None, one)], path), numbers([(None, one)]), direction)
    c, d = (dct_matrix(n, dtype=torch.float64, device=device) for n in (rows, cols))
    for mine, dense in zip(found, from_spectrum(c @ direction.double().T @ x.double() @ d.T, one), strict=True):
        assert (mine - dense).norm() <= 2e-6 * dense.norm()


def test_what_was_worked_out_in_inference_mode_serves_training(vit, images, path):
    inject(vit, LoCAConfig(n_components=30))
    randomise(vit)
    vit.requires_grad_(True)  # so that the first call keeps no weight
    with torch.inference_mode():
        first = vit(images)
    for name, parameter in vit.named_parameters():
        parameter.requires_grad_(".loca." in name)
    second = vit(images)
    second.square().sum().backward()
    torch.testing.assert_close(first, second.detach())
    assert path == "applied" or torch.equal(first, second.detach())
    assert all(number.grad is not None for update in adapters(vit).values() for number in update.parameters())


@pytest.mark.parametrize(("model", "images"), [("unet", "sample"), ("sd3", "hidden_states")])
def test_a_whole_model_learns_the_same_by_every_way(model, images, monkeypatch):
    """Gradients of what is learned, and of what comes in first; and those who see the same activations transform them once."""
    found, inputs = {}, tiny.inputs_of(getattr(tiny, model)())
    calls, real = [], token_spectrum.in_pieces
    monkeypatch.setattr(token_spectrum, "in_pieces", lambda x, *more: calls.append(len(x)) or real(x, *more))
    for way, costs in FORCED.items():
        monkeypatch.setattr(paths, "COSTS", costs)
        adapted = getattr(tiny, model)().requires_grad_(False)
        inject(adapted, LoCAConfig(n_components=30, targets=("q", "k", "v", "out")))
        randomise(adapted)
        first = inputs[images].detach().requires_grad_()
        calls.clear()
        adapted(**inputs | {images: first}).sample.square().sum().backward()
        found[way] = [first.grad, *(number.grad for update in adapters(adapted).values() for number in update.parameters())]
        transforms, projections = len(calls), len(adapters(adapted))
        assert transforms == 0 if way == "whole" else 0 < transforms < 0.7 * projections
    for way in ("sampled", "applied"):
        for mine, whole in zip(found[way], found["whole"], strict=True):
            torch.testing.assert_close(mine, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())
