"""Updates of one shape that learn, built together at the first use of one of them in a forward pass.

An accelerator spends longer on starting the operations of one update than on carrying them out. Each update is handed out
once: to ask for it again is to begin another pass, for which all are built anew. What autograd sees of an update is a tensor
that takes no memory, and through which the gradient of the matrix reaches the coefficients and locations.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from loca_vision.functional.cosine_atoms import AtomSettings
from loca_vision.functional.cosine_batch import CosineBatch, batch_of
from loca_vision.functional.snapshot import steps_unseen
from loca_vision.functional.transforms import once_differentiable
from loca_vision.methods.locations import cells_at
from loca_vision.methods.spectrum import Spectrum, confine
from loca_vision.methods.update import Update

if TYPE_CHECKING:
    from loca_vision.layers.weight_updates import AdapterSlot, WeightUpdates

# Bytes of the float32 matrices that are built at once. All gradients of a batch are alive together in the backward pass.
LARGEST_BATCH = 2**28


class Built(NamedTuple):
    """One update of a pass.

    Attributes:
        matrix: its values (p, q), without a gradient.
        ticket: (p, q) without values, whose gradient is that of the matrix.
    """

    matrix: Tensor
    ticket: Tensor


class _Site(NamedTuple):
    updates: weakref.ref[WeightUpdates]
    slot: AdapterSlot
    update: Spectrum


class _Batch:
    """Updates that have been built, and which of them have not been asked for yet."""

    def __init__(self, left: dict[int, tuple[tuple[Any, ...], Built]], spent: list[bool]) -> None:
        self.circumstances = {key: circumstances for key, (circumstances, _) in left.items()}
        self.left = {key: built for key, (_, built) in left.items()}
        self.spent = spent  # shared with the graph, which is not to be held from here: a backward pass has gone through it

    def is_of(self, update: Spectrum, circumstances: tuple[Any, ...]) -> bool:
        """Whether the update is still what was built."""
        return not self.spent[0] and self.circumstances.get(id(update)) == circumstances


class BuiltTogether:
    """The updates of one model that may be built together: those of the weights that have asked for theirs."""

    def __init__(self) -> None:
        self._members: dict[int, weakref.ref[WeightUpdates]] = {}
        self._peers_of: dict[int, list[_Site]] | None = None  # by the identity of an update
        self._batches: dict[int, _Batch] = {}  # likewise, the one that it was built in last

    def join(self, updates: WeightUpdates) -> None:
        """Let the updates of one more weight take part."""
        known = self._members.get(id(updates))
        if known is None or known() is not updates:
            self._members[id(updates)] = weakref.ref(updates)
            self.forget()

    def forget(self) -> None:
        """Updates came, went or act in another way."""
        self._peers_of = None
        self._batches.clear()

    def take(self, update: Update, factor: float, dtype: torch.dtype) -> Built | None:
        """The update times `factor`, for activations of this dtype; None if it is none that is built with others."""
        if not isinstance(update, Spectrum) or not _is_ordinary(update):
            return None
        now, batch = _circumstances(update, factor, dtype), self._batches.get(id(update))
        if batch is not None and batch.is_of(update, now):
            built = batch.left.pop(id(update), None)
            if built is not None:
                return built
            if batch.left:  # a layer that runs more than once in a pass
                return _built([update], factor, dtype, [False])[0]
        return self._build(update, factor, dtype)

    def _build(self, update: Spectrum, factor: float, dtype: torch.dtype) -> Built:
        updates, spent = self._batch(update, factor), [False]
        made = _built(updates, factor, dtype, spent)
        left = {id(own): (_circumstances(own, factor, dtype), one) for own, one in zip(updates, made, strict=True)}
        batch = _Batch(left, spent)
        self._batches |= dict.fromkeys(left, batch)
        return batch.left.pop(id(update))

    def _batch(self, update: Spectrum, factor: float) -> list[Spectrum]:
        """The update and those near it that act like it."""
        if self._peers_of is None:
            self._peers_of = self._peers()
        kind, found = _kind(update), []
        for site in self._peers_of.get(id(update), ()):
            updates = site.updates()
            strength = None if updates is None else updates.strengths.get(site.slot.adapter)
            if updates is None or strength is None or updates.call_settings.scale * strength != factor:
                continue
            if site.update is not update and not site.update.inactive and _is_ordinary(site.update):
                found += [site.update] * (_kind(site.update) == kind)
        return [update, *found]

    def _peers(self) -> dict[int, list[_Site]]:
        """The updates of one shape, in portions that may be built at once."""
        by_shape: dict[tuple[int, int], list[_Site]] = {}
        for member in self._members.values():
            updates = member()
            for slot, update in () if updates is None else updates.entries():
                if isinstance(update, Spectrum):
                    by_shape.setdefault(update.shape, []).append(_Site(member, slot, update))
        found: dict[int, list[_Site]] = {}
        for (rows, cols), sites in by_shape.items():
            many = max(1, LARGEST_BATCH // (4 * rows * cols))
            for start in range(0, len(sites), many):
                portion = sites[start : start + many]
                found |= {id(site.update): portion for site in portion}
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return BuiltTogether, ()  # a copy, or what comes from a pickle, learns of its own updates


def _is_ordinary(update: Spectrum) -> bool:
    """Whether it learns as a sum of cosines whose numbers are all here: not sharded, replicated or another kind's."""
    numbers = update.coefficients, update.locations
    return (
        type(update).delta is Spectrum.delta
        and all([type(number) is nn.Parameter and number.device == numbers[0].device for number in numbers])
        and (numbers[0].requires_grad or numbers[1].requires_grad)
    )


def _kind(update: Spectrum) -> tuple[Any, ...]:
    """What updates of one batch have in common."""
    numbers, scale = (update.coefficients, update.locations), (update.scale, update.difference)
    return (*[(x.dtype, x.device, x.requires_grad) for x in numbers], *scale)


def _circumstances(update: Spectrum, factor: float, dtype: torch.dtype) -> tuple[Any, ...]:
    """What must be the same when an update is asked for as when it was built; the last is the backward pass, if one runs."""
    numbers = update.coefficients, update.locations
    learns = [(number._version, number.data_ptr(), number.requires_grad) for number in numbers]
    return (*learns, steps_unseen(), factor, dtype, update.scale, torch._C._current_graph_task_id())


def _built(updates: Sequence[Spectrum], factor: float, dtype: torch.dtype, spent: list[bool]) -> list[Built]:
    first = updates[0]
    moving = first.locations.requires_grad
    if moving:
        confine(updates)
    with torch.no_grad(), torch.autocast(first.coefficients.device.type, enabled=False):
        coefficients = torch.cat([own.coefficients for own in updates])
        cells = cells_at(torch.cat([own.locations for own in updates]), first.shape)
        settings = AtomSettings(first.shape, first.scale * factor, first.difference)
        batch = batch_of(coefficients, cells, [len(own.coefficients) for own in updates], settings, dtype)
        matrices = batch.matrices().unbind(0)
    numbers = [own.coefficients for own in updates] + [own.locations for own in updates]
    tickets = _Tickets.apply(batch, dtype, spent, torch._C._current_graph_task_id() >= 0, *numbers)
    return list(map(Built, matrices, tickets))


class _Tickets(torch.autograd.Function):
    """Nothing is saved by autograd's own means: hooks of checkpointing count what a block saves, and others share this."""

    @staticmethod
    def forward(
        ctx: Any, batch: CosineBatch, dtype: torch.dtype, spent: list[bool], running: bool, *numbers: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.batch, ctx.spent, ctx.running = batch, spent, running
        ctx.set_materialize_grads(False)
        count, shape = len(batch.layout.counts), batch.layout.shape
        return batch.coefficients.new_empty((), dtype=dtype).expand(count, *shape).unbind(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        batch, counts = ctx.batch, ctx.batch.layout.counts
        ctx.spent[0] |= not ctx.running  # built while a backward pass runs, for blocks that it runs again one by one
        learned, moving = ctx.needs_input_grad[4], ctx.needs_input_grad[4 + len(counts)]
        given = [i for i, grad in enumerate(grads) if grad is not None]
        of_numbers: list[Tensor | None] = [None] * (2 * len(counts))
        with torch.autocast(batch.coefficients.device.type, enabled=False):
            part = batch if len(given) == len(counts) else batch.part(given)
            found = part.gradients([grads[i] for i in given], learned, moving) if given else ()
        for half, whole in enumerate(found):
            for i, own in zip(given, () if whole is None else torch.split(whole, part.layout.counts), strict=whole is not None):
                of_numbers[half * len(counts) + i] = own
        return (None, None, None, None, *of_numbers)


class _Read(torch.autograd.Function):
    """A weight that contains matrices of updates, as a function of their tickets."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rows: Sequence[Any], *tickets: Tensor) -> Tensor:
        ctx.rows = rows
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *[grad if rows is None else grad[rows] for rows in ctx.rows]


def read(weight: Tensor, rows: Sequence[Any], tickets: Sequence[Tensor]) -> Tensor:
    """`weight` (n, q), with the gradients of these rows going to the tickets."""
    result: Tensor = _Read.apply(weight, rows, *tickets)
    return result
