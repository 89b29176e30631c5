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
        rows: the rows of the weight that the update changes.
        update: the update itself.
        named: whether the update belongs to a projection of attention or an MLP, which are called with the batch as far as is
            known; any other layer may be called with anything.
    """

    rows: Rows
    update: Update | PackedUpdate
    named: bool = True


@dataclass(frozen=True, eq=False)
class HeldAdapter:
    """The parts of an adapter that a call needs. They do not change while a call holds them, whatever happens to the model.

    Args:
        name: the adapter's name, for error messages.
        updates: the updates by the handle of their weight.
        whole: the tensors that the adapter trains as a whole, such as a classifier head, by their names in the model.
    """

    name: str
    updates: Mapping[int, Sequence[PlacedUpdate]]
    whole: Mapping[str, Tensor] = field(default_factory=dict)


Entry = tuple[tuple[HeldAdapter, float], ...]  # the adapters of a sample and their strengths; empty for the base model


class Mixture:
    """The adapters of every sample in the calls of one model.

    Args:
        entries: one for each sample, or for each prompt of a pipeline.
        expand: maps the size of a batch to the index of each sample's entry, and raises ValueError if the size is impossible.
            By default, the batch has one sample for each entry.
    """

    def __init__(self, entries: Sequence[Entry], expand: Callable[[int], Sequence[int]] | None = None) -> None:
        self.entries = tuple(entries)
        self.expand = expand
        self.samples: tuple[int, ...] = tuple(range(len(entries)))
        self.known: dict[Any, Any] = {}  # results computed for these samples
        self.handles: tuple[int, ...] = ()  # of all modules that take part
        self.fits_model = False  # whether the model itself was called, so that the size of its batch is known
        self.keep_up: Callable[[nn.Module], None] = lambda model: None  # adjusts to changes that the model has undergone

    def fit(self, batch: int, called: str) -> None:
        """Adjust to a call of the model with a batch of this size; `called` names what was called, for the message.

        Raises:
            ValueError: the batch size does not match the number of entries.
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
        """Adjust to a call of the model with a batch of this size, and to changes that the model has undergone.

        Raises:
            ValueError: as in `fit`.
            ValueError, RuntimeError: the model has changed so that it can no longer compute what it would have.
        """
        self.keep_up(model)
        self.fit(batch, type(model).__name__)
        self.fits_model = True

    def differs(self) -> bool:
        """Whether any two samples have different adapters; if not, their positions in a layer's input do not matter."""
        own = {tuple((id(adapter), strength) for adapter, strength in self.entries[index]) for index in self.samples}
        return len(own) > 1

    def note(self, handle: int, x: Tensor) -> None:
        """Check a call of a layer with x.

        Raises:
            ValueError: the model's own `forward` was not called, and x is not a batch of the right size.
        """
        if not self.fits_model and self.differs():
            self.fit(len(x) if x.dim() else 1, "a layer of the model")

    def by_sample(self) -> list[Entry]:
        """Return the entry of every sample of the batch."""
        return [self.entries[index] for index in self.samples]

    def once(self, key: Any, work: Callable[[], Any]) -> Any:
        """Return `work()`, cached under `key` until the samples change."""
        if key not in self.known:
            self.known[key] = work()
        return self.known[key]


_HANDLE = "_loca_handle"
NOT_COPIED = {_HANDLE: 0}  # attributes of a module that are reset in a copy
_HANDLES = itertools.count(1)
_GIVING = Lock()
BATCHED: dict[int, bool] = {}
"""Whether the layer with this handle is called with a batch, for the layers where that has been tried."""
_OWNERS: dict[int, weakref.ref[nn.Module]] = {}
_BEFORE: dict[int, Mixture] = {}  # the mixture of the module's last call, in any thread
_OPEN: dict[int, dict[int, Mixture]] = {}  # all contexts, in all threads, by identity
_CURRENT: ContextVar[tuple[dict[int, Mixture], ...]] = ContextVar("loca_mixtures", default=())  # the innermost comes last


def handle_of(module: nn.Module) -> int:
    """Return the module's handle, a unique number that is assigned when it is first needed for a call that mixes adapters."""
    return module_handle(module) or _given_handle(module)


def module_handle(module: nn.Module) -> int:
    """Return the module's own handle, or 0 if it has none; a handle that came with a copy of another module does not count."""
    handle: int = module.__dict__.get(_HANDLE, 0)
    return handle if owner_of(handle) is module else 0


def _given_handle(module: nn.Module) -> int:
    with _GIVING:  # so that two threads cannot give a module two handles
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
    """Release the adapters that the module's last call mixed, which are kept for the backward pass."""
    _BEFORE.pop(module_handle(module), None)


def owner_of(handle: int) -> nn.Module | None:
    """Return the module with this handle, or None if there is none any more."""
    found = _OWNERS.get(handle)
    return None if found is None else found()


@contextmanager
def mixing(mixtures: Mapping[int, Mixture]) -> Iterator[None]:
    """Make calls of these modules mix adapters inside the context, in this thread or task.

    Raises:
        RuntimeError: a generator made two contexts of a module end in the wrong order, or the context ends in another thread
            or task than the one it began in.
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
    """Whether any thread is inside a mixing context of the module."""
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
    """Add these mixtures to the model's current context, replacing those of the same modules."""
    handle = module_handle(model)
    next(own for own in reversed(_CURRENT.get()) if handle in own).update(mixtures)


def mixture_of(module: nn.Module) -> Mixture | None:
    """Return how calls of this module mix adapters now, or None if they do not.

    During a backward pass, return the mixture of the last call instead: a checkpointed block runs again then, in one of
    autograd's threads or after the context has ended.
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
    """Return the batch size of a model's inputs: that of the first tensor, or the length of the first list of tensors."""
    for value in (*inputs, *named.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return len(value)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
            return len(value)
    return None
