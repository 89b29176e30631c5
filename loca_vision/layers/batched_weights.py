"""Effective weights of one shape that are built together, and whose updates' gradients are computed together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loca_vision.functional.batch_tables import BatchCells
from loca_vision.functional.cosine_batch import CosineBatch
from loca_vision.functional.row_linear import Rows
from loca_vision.functional.transforms import once_differentiable
from loca_vision.methods.locations import cells_at
from loca_vision.methods.spectrum import Spectrum


class Built(NamedTuple):
    """The effective weight of one layer.

    Attributes:
        weight: W + the updates, (n, q) in the dtype of the activations. If `rows` is empty, gradients flow through it.
        rows: the rows of each update that is trained.
        tickets: for each of them, a tensor (p, q) without memory of its own that receives the gradient of these rows.
    """

    weight: Tensor
    rows: tuple[Rows, ...] = ()
    tickets: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Part:
    """Updates of one shape that train the same parameters, with at most one update for each row of a weight.

    Attributes:
        batch: the sums of the updates.
        spectra: the updates, each with the index of its weight.
        rows: the rows of each update in its weight.
    """

    batch: CosineBatch
    spectra: tuple[tuple[int, Spectrum], ...]
    rows: tuple[Rows, ...]

    @property
    def learns(self) -> tuple[bool, bool]:
        """Whether the coefficients are trained, and whether the locations are."""
        first = self.spectra[0][1]
        return first.coefficients.requires_grad, first.locations.requires_grad

    def numbers(self) -> list[nn.Parameter]:
        return [spectrum.coefficients for _, spectrum in self.spectra] + [spectrum.locations for _, spectrum in self.spectra]


def built(parts: Sequence[Part], bases: Sequence[Tensor], dtype: torch.dtype, spent: list[bool]) -> list[Built]:
    """Return the effective weights of these bases W (n, q), which share one shape, dtype and device.

    Args:
        parts: the updates to add.
        bases: the weights W.
        dtype: the dtype of the activations, and of the result.
        spent: becomes [True] once gradients have flowed through any of the weights.
    """
    with torch.no_grad(), torch.autocast(bases[0].device.type, enabled=False):
        weights = _sums(parts, bases).to(bases[0].dtype).to(dtype)
    learning = [part for part in parts if any(part.learns)]
    plan = _Plan(tuple(learning), spent, torch._C._current_graph_task_id() < 0, dtype)
    numbers = [number for part in learning for number in part.numbers()]
    if len(learning) == 1 and len(learning[0].spectra) == len(bases) and learning[0].rows[0] is None:
        return [Built(weight) for weight in _Gradients.apply(plan, weights, *numbers)]
    tickets = _Gradients.apply(plan, None, *numbers)
    where = [(index, rows) for part in learning for (index, _), rows in zip(part.spectra, part.rows, strict=True)]
    own: list[list[tuple[Rows, Tensor]]] = [[] for _ in bases]
    for (index, rows), ticket in zip(where, tickets, strict=True):
        own[index].append((rows, ticket))
    return [Built(weight, *zip(*pairs, strict=True)) for weight, pairs in zip(weights, own, strict=True)]


def _sums(parts: Sequence[Part], bases: Sequence[Tensor]) -> Tensor:
    """Return W + the updates, (L, n, q) in float32 or float64, with one addition for all weights."""
    wide = torch.promote_types(bases[0].dtype, torch.float32)
    first, rest = parts[0], parts[1:]
    if first.rows[0] is None and first.batch.coefficients.dtype == wide:
        result = first.batch.matrices()
        if bases[0].dtype == wide:
            torch._foreach_add_(list(result.unbind(0)), list(bases))
        else:  # with two dtypes, the foreach operation would launch once per weight
            result.add_(torch.stack(list(bases)))
    else:
        result, rest = bases[0].new_empty(len(bases), *bases[0].shape, dtype=wide), parts
        torch._foreach_copy_(list(result.unbind(0)), list(bases))
    for part in rest:
        places = zip(part.spectra, part.rows, strict=True)
        onto = [result[index] if rows is None else result[index, rows] for (index, _), rows in places]
        torch._foreach_add_(onto, list(part.batch.matrices().to(wide).unbind(0)))
    return result


@dataclass(frozen=True)
class _Plan:
    """The inputs of the gradient computation; none of the tensors has an autograd history."""

    parts: tuple[Part, ...]
    spent: list[bool]
    first_pass: bool  # False while a backward pass runs checkpointed blocks again, each with its own gradients
    dtype: torch.dtype  # of the weights; gradients of tickets in another dtype would be converted one by one


class _Gradients(torch.autograd.Function):
    """Connect the trained numbers to weights that have been built, or to tickets in their place.

    Nothing is saved with `save_for_backward`: checkpointing counts what each block saves, and blocks share this.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, weights: Tensor | None, *numbers: Tensor) -> tuple[Tensor, ...]:
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        if weights is not None:
            return weights.detach().unbind(0)
        made: list[Tensor] = []
        for part in plan.parts:
            nothing = part.batch.coefficients.new_empty((), dtype=plan.dtype)
            made += nothing.expand(len(part.spectra), *part.batch.layout.shape).unbind(0)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        plan.spent[0] |= plan.first_pass
        found: list[Tensor | None] = [None, None]
        wanted, start = ctx.needs_input_grad[2:], 0
        for part in plan.parts:
            count = len(part.spectra)
            flags = wanted[2 * start], wanted[2 * start + count]
            found += _of_part(part, grads[start : start + count], *flags)
            start += count
        return tuple(found)


def _of_part(part: Part, grads: Sequence[Tensor | None], learned: bool, moving: bool) -> list[Tensor | None]:
    """Return the gradients of all coefficients, then of all locations; None for updates whose matrix has no gradient."""
    count = len(grads)
    found: list[Tensor | None] = [None] * (2 * count)
    given = {i: grad for i, grad in enumerate(grads) if grad is not None}
    if not given:
        return found
    batch = part.batch if len(given) == count else part.batch.part([*given])
    with torch.autocast(batch.coefficients.device.type, enabled=False):
        halves = batch.gradients([*given.values()], learned, moving)
    for half, whole in enumerate(halves):
        if whole is not None:
            for i, own in zip(given, torch.split(whole, batch.layout.counts), strict=True):
                found[half * count + i] = own
    return found


@torch.no_grad()
def layout_of(spectra: Sequence[Spectrum]) -> BatchCells:
    """Return the layout of the cells of all spectra."""
    cells = cells_at(torch.cat([spectrum.locations for spectrum in spectra]), spectra[0].shape)
    return BatchCells(cells, [len(spectrum.coefficients) for spectrum in spectra], spectra[0].shape)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Sequence[Rows], *tickets: Tensor) -> Tensor:
        ctx.rows = rows
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *[grad if rows is None else grad[rows] for rows in ctx.rows]


def read(one: Built) -> Tensor:
    """Return the weight such that gradients flow through it."""
    if not one.rows:
        return one.weight
    result: Tensor = _Read.apply(one.weight, one.rows, *one.tickets)
    return result
