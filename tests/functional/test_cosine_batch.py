"""Batches of sums of cosines, in both forms and with split products, against dense matrices in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from loca_vision.functional import batch_by_components, batch_by_frequencies, split_products
from loca_vision.functional.batch_tables import BatchCells
from loca_vision.functional.cosine_batch import CosineBatch
from loca_vision.functional.split_products import HALVES, LEFT, RIGHT, TWICE, is_preferred, parts, product
from support.formulas import cosine_inverse

SCALE = 0.7
STEPS = {"central": ((1, 0.5), (-1, -0.5)), "forward": ((1, 1.0), (0, -1.0)), "backward": ((0, 1.0), (-1, -1.0))}
PRECISIONS = {
    "float64": (torch.float64, False, 1e-12),
    "float32": (torch.float32, False, 2e-6),
    "split": (torch.float32, True, 3e-5),
}
SIZES = {
    "a cell": ((1, 1), (1, 1)),
    "a row": ((1, 7), (3, 3)),
    "a column": ((9, 1), (2, 2)),
    "few": ((12, 20), (5, 5, 5)),
    "one component": ((33, 20), (1, 1)),
    "many": ((12, 20), (70, 70)),
    "other counts": ((20, 12), (1, 9, 4)),
}

sizes = pytest.mark.parametrize(("shape", "counts"), SIZES.values(), ids=SIZES)
precisions = pytest.mark.parametrize(("dtype", "split", "error"), PRECISIONS.values(), ids=PRECISIONS)


def make(
    shape: tuple[int, int],
    counts: Sequence[int],
    dtype: torch.dtype,
    split: bool,
    device: torch.device,
    difference: str = "central",
) -> CosineBatch:
    """The first and the last cell are among the cells, and some occur twice."""
    cells = torch.stack([torch.randint(size, (sum(counts),)) for size in shape], 1)
    cells[0], cells[-1] = 0, torch.tensor(shape) - 1
    layout = BatchCells(cells.to(device), counts, shape)
    return CosineBatch(torch.randn(sum(counts)).to(device, dtype), layout, SCALE, difference, split)


def dense(batch: CosineBatch) -> Tensor:
    """The sums, on the CPU in float64."""
    counts, (p, q) = batch.layout.counts, batch.layout.shape
    spectra = torch.zeros(len(counts), p, q, dtype=torch.float64)
    which = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    values = batch.coefficients.cpu().double() * batch.scale
    spectra.index_put_((which, *batch.layout.cells.cpu().T), values, accumulate=True)
    return torch.stack([cosine_inverse(one) for one in spectra])


def atoms(batch: CosineBatch, cells: Tensor) -> Tensor:
    """(M, p, q): what each component with coefficient 1 would make of a matrix, were it at these cells."""
    last = torch.tensor(batch.layout.shape) - 1
    near = cells.clamp(min=0).minimum(last)
    made = []
    for u, v in near.tolist():
        one = torch.zeros(batch.layout.shape, dtype=torch.float64)
        one[u, v] = 1
        made.append(cosine_inverse(one))
    return torch.stack(made)


def brute(batch: CosineBatch, grads: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The gradients of coefficients and locations, cell by cell."""
    layout, cells = batch.layout, batch.layout.cells.cpu()
    own = torch.stack([grad.cpu().double() for grad in grads]).repeat_interleave(torch.tensor(layout.counts), 0)

    def z(row: int = 0, col: int = 0) -> Tensor:
        return batch.scale * (own * atoms(batch, cells + torch.tensor([row, col]))).sum((1, 2))

    steps = STEPS[batch.difference]
    slopes = [sum(weight * z(step, 0) for step, weight in steps), sum(weight * z(0, step) for step, weight in steps)]
    lengths = torch.tensor(layout.shape, dtype=torch.float64) - 1
    return z(), torch.stack(slopes, 1) * lengths * batch.coefficients.cpu().double()[:, None]  # type: ignore[arg-type]


def assert_near(found: Tensor | None, right: Tensor, error: float) -> None:
    assert found is not None
    largest = max(float(right.abs().max()), 1e-3)
    torch.testing.assert_close(found.cpu().double(), right, rtol=0, atol=error * largest)


@precisions
@sizes
def test_the_sums(shape, counts, dtype, split, error, device) -> None:
    batch = make(shape, counts, dtype, split, device)
    found = batch.matrices()
    assert found.dtype == dtype
    assert_near(found, dense(batch), error)


@precisions
@sizes
@pytest.mark.parametrize("difference", STEPS)
def test_the_gradients(shape, counts, dtype, split, error, difference, device) -> None:
    batch = make(shape, counts, dtype, split, device, difference)
    grads = [torch.randn(shape).to(device, dtype) for _ in counts]
    coefficients, locations = batch.gradients(grads, True, True)
    assert_near(coefficients, brute(batch, grads)[0], error)
    assert_near(locations, brute(batch, grads)[1], error)
    alone, nothing = batch.gradients(grads, True, False)
    assert nothing is None
    torch.testing.assert_close(alone, coefficients)
    nothing, alone = batch.gradients(grads, False, True)
    assert nothing is None
    torch.testing.assert_close(alone, locations)


@precisions
@pytest.mark.parametrize("form", [batch_by_components, batch_by_frequencies], ids=["components", "frequencies"])
def test_both_forms_are_one_sum(form, dtype, split, error, device, monkeypatch) -> None:
    """Whatever would be chosen."""
    batch = make((12, 20), (9, 9), dtype, split, device)
    monkeypatch.setattr(CosineBatch, "_form", form)
    grads = [torch.randn(12, 20).to(device, dtype) for _ in range(2)]
    assert_near(batch.matrices(), dense(batch), error)
    for found, right in zip(batch.gradients(grads, True, True), brute(batch, grads), strict=True):
        assert_near(found, right, error)


@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [5, 70])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_gradients_in_half_precision(grad_dtype, count, split, device) -> None:
    """Which bfloat16 holds exactly, so that its products need no second part of them."""
    batch = make((12, 20), (count, count), torch.float32, split, device)
    grads = [torch.randn(12, 20).to(device, grad_dtype) for _ in range(2)]
    for found, right in zip(batch.gradients(grads, True, True), brute(batch, grads), strict=True):
        assert_near(found, right, 3e-5 if split else 2e-6)


@pytest.mark.parametrize("counts", [(5, 5, 5, 5), (1, 9, 4, 2)], ids=["alike", "others"])
def test_a_part_of_a_batch(counts, device) -> None:
    batch = make((12, 20), counts, torch.float64, False, device)
    some = batch.part([2, 0])
    assert_near(some.matrices(), dense(batch)[[2, 0]], 1e-12)
    grads = [torch.randn(12, 20, dtype=torch.float64, device=device) for _ in range(2)]
    zeros = torch.zeros_like(grads[0])
    for found, right in zip(some.gradients(grads, True, True), brute(batch, [grads[1], zeros, grads[0], zeros]), strict=True):
        own = torch.split(right, counts)
        assert_near(found, torch.cat([own[2], own[0]]), 1e-12)


@pytest.mark.parametrize(("left", "right", "exact"), [(LEFT, RIGHT, False), (HALVES, TWICE, True)], ids=["two parts", "one"])
@pytest.mark.parametrize("stacked", [False, True], ids=["matrices", "stacks"])
def test_a_product_of_parts(left, right, exact, stacked, device) -> None:
    one, other = torch.randn(*[3] * stacked, 30, 40, device=device), torch.randn(*[3] * stacked, 40, 20, device=device)
    other = other.bfloat16().float() if exact else other
    found = product(parts(one, left, -1), parts(other, right, -2))
    assert_near(found, one.double().cpu() @ other.double().cpu(), 3e-5)
    assert float((found.double().cpu() - one.double().cpu() @ other.double().cpu()).abs().max()) > 0


def test_the_cpu_has_no_use_for_parts() -> None:
    assert not is_preferred(torch.device("cpu"), torch.bfloat16)


def test_parts_stand_in_for_tf32_however_it_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch refuses to name its precision once its newer settings have been used."""
    monkeypatch.setattr(split_products, "_is_possible", lambda device: True)
    device, settings = torch.device("cuda"), torch.backends.cuda.matmul
    assert not is_preferred(device, torch.float32)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert is_preferred(device, torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(split_products, "_is_possible", lambda device: True)
    if hasattr(settings, "fp32_precision"):
        before, settings.fp32_precision = settings.fp32_precision, "tf32"
        try:
            assert is_preferred(device, torch.float32)
        finally:
            settings.fp32_precision = before
    assert not is_preferred(device, torch.float32)
