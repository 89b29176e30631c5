"""The linear map that learns in some of its rows, against a dense weight and autograd."""

import pytest
import torch
from torch.nn import functional as F

from loca_vision.functional.row_linear import add_rows, row_linear

ROWS = {
    "all": [None],
    "query and value": [slice(0, 4), slice(8, 12)],
    "interleaved": [torch.tensor([0, 1, 6, 7]), torch.tensor([4, 5, 10, 11])],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_values_and_gradients_are_those_of_the_whole_weight(rows, lead, device):
    base, bias, x = (torch.randn(size, dtype=torch.float64).to(device) for size in ((12, 5), (12,), (*lead, 5)))
    bias.requires_grad_(), x.requires_grad_()
    deltas = [torch.randn_like(base if r is None else base[r]).requires_grad_() for r in rows]
    updates = list(zip(rows, deltas, strict=True))
    inputs = (x, bias, *deltas)
    with torch.no_grad():
        weight = add_rows(base, updates)
    mine, whole = row_linear(x, weight, bias, updates), F.linear(x, add_rows(base, updates), bias)
    assert torch.equal(mine, whole)
    direction = torch.randn_like(mine)
    for ours, theirs in zip(*(torch.autograd.grad(y, inputs, direction) for y in (mine, whole)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
def test_with_and_without_gradients_rows_add_up_to_the_same_bits(rows, dtype, device):
    base = torch.randn(12, 5).to(device, dtype)
    before = base.clone()
    updates = [(r, torch.randn(base.shape if r is None else base[r].shape).to(device)) for r in rows]
    whole = add_rows(base, updates)
    with torch.no_grad():
        assert torch.equal(add_rows(base, updates), whole)
    assert whole.dtype == dtype and torch.equal(base, before)
    untouched = [i for i in range(12) if all(i not in torch.arange(12)[slice(None) if r is None else r] for r in rows)]
    assert torch.equal(whole[untouched], base[untouched])


def test_what_wants_no_gradient_costs_none():
    x, delta = torch.randn(7, 5), torch.randn(4, 5, requires_grad=True)
    frozen = torch.randn(4, 5)
    updates = [(slice(0, 4), delta), (slice(8, 12), frozen)]
    row_linear(x, torch.randn(12, 5), None, updates).sum().backward()
    assert delta.grad is not None and x.grad is None and frozen.grad is None


def test_under_autocast_the_product_is_in_its_dtype_and_the_gradient_is_not(device):
    x, delta, weight = (torch.randn(rows, 5).to(device) for rows in (7, 12, 12))
    x.requires_grad_(), delta.requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        y = row_linear(x, weight, torch.zeros(12, device=device), [(None, delta)])
        assert torch.equal(y, F.linear(x, weight, torch.zeros(12, device=device)))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and delta.grad.dtype == x.grad.dtype == torch.float32
