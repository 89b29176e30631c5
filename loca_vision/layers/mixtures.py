"""Which updates act on each sample of a batch, for calls that mix several adapters."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loca_vision.functional.row_linear import Rows

if TYPE_CHECKING:
    from loca_vision.methods.packed_update import PackedUpdate
    from loca_vision.methods.update import Update


@dataclass(frozen=True, eq=False, slots=True)
class PlacedUpdate:
    """One update of an adapter.

    Args:
        rows: of the weight, that it changes.
        named: whether it is of a projection of attention or of an MLP, which see the batch as far as is known; any other layer
            may be called with anything.
    """

    rows: Rows
    update: Update | PackedUpdate
    named: bool = True


@dataclass(frozen=True, eq=False)
class HeldAdapter:
    """What a call needs of an adapter. It stays as it is for as long as a call holds it, whatever becomes of the model.

    Args:
        name: for error messages.
        updates: by the handle of the weight.
        whole: the tensors that it trains as a whole, such as a classifier head, by name in the model.
    """

    name: str
    updates: Mapping[int, Sequence[PlacedUpdate]]
    whole: Mapping[str, Tensor] = field(default_factory=dict)


Entry = tuple[tuple[HeldAdapter, float], ...]  # the adapters of a sample, and how strongly each acts; empty for the base


class Mixture:
    """The adapters of every sample of the calls of one model.

    Args:
        entries: one for each sample, or for each prompt of a pipeline.
        expand: makes of the size of a batch the entry of each of its samples; by default the batch is one of the entries.
            Raises ValueError where it cannot be.
    """

    def __init__(self, entries: Sequence[Entry], expand: Callable[[int], Sequence[int]] | None = None) -> None:
        self.entries = tuple(entries)
        self.expand = expand
        self.samples: tuple[int, ...] = tuple(range(len(entries)))
        self.known: dict[Any, Any] = {}  # what was worked out for these samples
        self.handles: tuple[int, ...] = ()  # of all that take part

    def fit(self, batch: int, called: str) -> None:
        """The model is called with a batch of this size.

        Raises:
            ValueError: the number of entries is another one.
        """
        if self.expand is None and batch != len(self.entries):
            raise ValueError(
                f"per_sample has {len(self.entries)} entries, one for each sample, and {called} was called with a batch of "
                f"{batch}"
            )
        samples = tuple(range(batch)) if self.expand is None else tuple(self.expand(batch))
        if samples != self.samples:
            self.samples, self.known = samples, {}

    def differs(self) -> bool:
        """Whether any two samples have different adapters: if not, it does not matter where in a layer's input they are."""
        own = {tuple((id(adapter), strength) for adapter, strength in self.entries[index]) for index in self.samples}
        return len(own) > 1

    def note(self, handle: int, lead: int) -> None:
        """A layer is called with so many vectors along its first axis."""

    def by_sample(self) -> list[Entry]:
        """The entry of every sample of the batch."""
        return [self.entries[index] for index in self.samples]

    def once(self, key: Any, work: Callable[[], Any]) -> Any:
        """`work()`, remembered for as long as the samples are the same."""
        if key not in self.known:
            self.known[key] = work()
        return self.known[key]


_HANDLE, _BEFORE = "_loca_handle", "_loca_mixture_before"
NOT_COPIED = {_HANDLE: 0, _BEFORE: None}  # of a module's attributes
_HANDLES = itertools.count(1)
BATCHED: dict[int, bool] = {}
"""Whether the layer with this handle is called with a batch, as far as that was tried."""
_OWNERS: dict[int, weakref.ref[nn.Module]] = {}
_CURRENT: ContextVar[Mapping[int, Mixture]] = ContextVar("loca_mixtures", default=MappingProxyType({}))


def handle_of(module: nn.Module) -> int:
    """A number by which calls that mix adapters know the module, given at the first such call and no other module's."""
    handle: int = module.__dict__.get(_HANDLE, 0)
    if owner_of(handle) is not module:
        handle = next(_HANDLES)
        module.__dict__[_HANDLE] = handle
        _OWNERS[handle] = weakref.ref(module, lambda _: _forget(handle))
    return handle


def _forget(handle: int) -> None:
    _OWNERS.pop(handle, None)
    BATCHED.pop(handle, None)


def owner_of(handle: int) -> nn.Module | None:
    """The module with this handle."""
    found = _OWNERS.get(handle)
    return None if found is None else found()


@contextmanager
def mixing(mixtures: Mapping[int, Mixture]) -> Iterator[None]:
    """Inside, in this thread or task, calls of these modules mix adapters."""
    token = _CURRENT.set(MappingProxyType({**_CURRENT.get(), **mixtures}))
    try:
        yield
    finally:
        _CURRENT.reset(token)


def mixture_of(module: nn.Module) -> Mixture | None:
    """How calls of this module mix adapters now.

    While gradients are computed, as before: a checkpointed block runs again, in a thread of autograd's or after the call.
    """
    handle = module.__dict__.get(_HANDLE, 0)
    if handle == 0 or owner_of(handle) is not module:  # a copy is another module
        return None
    if torch._C._current_graph_task_id() != -1:
        before: Mixture | None = module.__dict__.get(_BEFORE)
        return before
    found = _CURRENT.get().get(handle)
    if module.training or torch.is_grad_enabled():
        module.__dict__[_BEFORE] = found
    else:
        module.__dict__.pop(_BEFORE, None)
    return found


def batch_of(inputs: Sequence[Any], named: Mapping[str, Any]) -> int | None:
    """The size of the batch a model is called with: that of the first tensor, or the length of a list of tensors."""
    for value in (*inputs, *named.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return len(value)
    return None
