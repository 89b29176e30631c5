"""Which updates act on each sample of a batch, for calls that mix several adapters."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import Lock
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
        self.fits_model = False  # whether the model itself was called, which says how large its batch is
        self.keep_up: Callable[[nn.Module], None] = lambda model: None  # with what became of the model meanwhile

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

    def begin(self, batch: int, model: nn.Module) -> None:
        """The model is called with a batch of this size, and may have changed.

        Raises:
            ValueError: as `fit`.
            ValueError, RuntimeError: the model has changed so that it cannot answer as it would have.
        """
        self.keep_up(model)
        self.fit(batch, type(model).__name__)
        self.fits_model = True

    def differs(self) -> bool:
        """Whether any two samples have different adapters: if not, it does not matter where in a layer's input they are."""
        own = {tuple((id(adapter), strength) for adapter, strength in self.entries[index]) for index in self.samples}
        return len(own) > 1

    def note(self, handle: int, x: Tensor) -> None:
        """A layer is called with x.

        Raises:
            ValueError: the model's own `forward` was not called, and this is not a batch of the right size.
        """
        if not self.fits_model and self.differs():
            self.fit(len(x) if x.dim() else 1, "a layer of the model")

    def by_sample(self) -> list[Entry]:
        """The entry of every sample of the batch."""
        return [self.entries[index] for index in self.samples]

    def once(self, key: Any, work: Callable[[], Any]) -> Any:
        """`work()`, remembered for as long as the samples are the same."""
        if key not in self.known:
            self.known[key] = work()
        return self.known[key]


_HANDLE = "_loca_handle"
NOT_COPIED = {_HANDLE: 0}  # of a module's attributes
_HANDLES = itertools.count(1)
_GIVING = Lock()
BATCHED: dict[int, bool] = {}
"""Whether the layer with this handle is called with a batch, as far as that was tried."""
_OWNERS: dict[int, weakref.ref[nn.Module]] = {}
_BEFORE: dict[int, Mixture] = {}  # of the last call of the module, in any thread
_OPEN: dict[int, dict[int, Mixture]] = {}  # all contexts, in all threads, by identity
_CURRENT: ContextVar[tuple[dict[int, Mixture], ...]] = ContextVar("loca_mixtures", default=())  # the innermost comes last


def handle_of(module: nn.Module) -> int:
    """A number by which calls that mix adapters know the module, given at the first such call and no other module's."""
    return module_handle(module) or _given_handle(module)


def module_handle(module: nn.Module) -> int:
    """The module's own handle, or 0: a copy has the handle of the module it was copied from, which does not count."""
    handle: int = module.__dict__.get(_HANDLE, 0)
    return handle if owner_of(handle) is module else 0


def _given_handle(module: nn.Module) -> int:
    with _GIVING:  # two threads must not give a module two
        handle = module_handle(module)
        if handle == 0:
            handle = next(_HANDLES)
            _OWNERS[handle] = weakref.ref(module, lambda _: _forget(handle))
            module.__dict__[_HANDLE] = handle
    return handle


def _forget(handle: int) -> None:
    for known in (_OWNERS, BATCHED, _BEFORE):
        known.pop(handle, None)


def forget_last_call(module: nn.Module) -> None:
    """Let go of the adapters that the last call of the module mixed, which are kept for the backward pass."""
    _BEFORE.pop(module_handle(module), None)


def owner_of(handle: int) -> nn.Module | None:
    """The module with this handle."""
    found = _OWNERS.get(handle)
    return None if found is None else found()


@contextmanager
def mixing(mixtures: Mapping[int, Mixture]) -> Iterator[None]:
    """Inside, in this thread or task, calls of these modules mix adapters.

    Raises:
        RuntimeError: a generator mixed two contexts up, or the context ends in another thread than it began.
    """
    own = dict(mixtures)
    _CURRENT.set((*_CURRENT.get(), own))
    _OPEN[id(own)] = own
    try:
        yield
    finally:
        del _OPEN[id(own)]
        _end(own)


def is_mixed(module: nn.Module) -> bool:
    """Whether a context of the module is open, in any thread."""
    handle = module_handle(module)
    return any(handle in own for own in tuple(_OPEN.values()))


def _end(own: dict[int, Mixture]) -> None:
    around = _CURRENT.get()
    _CURRENT.set(tuple(one for one in around if one is not own))
    place = next((index for index, one in enumerate(around) if one is own), None)
    if place is None:
        raise RuntimeError("per_sample ends in another thread or task than it began, where calls did not mix its adapters")
    if any(own.keys() & later.keys() for later in around[place + 1 :]):
        raise RuntimeError(
            "per_sample ends before another context of the same model that began inside, as a generator may do that yields "
            "within: calls in between had the adapters of the other"
        )


def mix_also(model: nn.Module, mixtures: Mapping[int, Mixture]) -> None:
    """Let the context of the model that is under way have these in the place of its mixtures, or besides."""
    handle = module_handle(model)
    next(own for own in reversed(_CURRENT.get()) if handle in own).update(mixtures)


def mixture_of(module: nn.Module) -> Mixture | None:
    """How calls of this module mix adapters now.

    While gradients are computed, as before: a checkpointed block runs again, in a thread of autograd's or after the call.
    """
    handle = module_handle(module)
    if handle == 0:
        return None
    if torch._C._current_graph_task_id() != -1:
        return _BEFORE.get(handle)
    found = next((own[handle] for own in reversed(_CURRENT.get()) if handle in own), None)
    if found is not None and (module.training or torch.is_grad_enabled()):
        _BEFORE[handle] = found
    else:
        _BEFORE.pop(handle, None)
    return found


def batch_of(inputs: Sequence[Any], named: Mapping[str, Any]) -> int | None:
    """The size of the batch a model is called with: that of the first tensor, or the length of a list of tensors."""
    for value in (*inputs, *named.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return len(value)
    return None
