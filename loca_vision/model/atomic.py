"""All-or-nothing changes: if changing a model fails half-way, the model is left as it was."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.layers.class_swap import exchange_class
from loca_vision.layers.compiled_delta import CompiledDelta
from loca_vision.model.state import AdapterState, state_of
from loca_vision.model.traversal import modules_of
from loca_vision.model.whole_tensors import kept_elsewhere

_CONTAINERS = (dict, OrderedDict, list, set)  # exactly these types, because a subclass may be immutable


@contextmanager
def atomic(model: nn.Module, writes: Iterable[Tensor] = ()) -> Iterator[None]:
    """Undo everything done to the model inside the context if it raises, including on interruption.

    Structure, classes, hooks, `requires_grad` flags and gradients are always restored, values only for the tensors in `writes`
    and for offloaded or sharded tensors that an adapter trains as a whole.

    Args:
        model: the model to restore.
        writes: tensors that are written in place.
    """
    before = _Before(model, writes)
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def atomic_all(
    models: Iterable[nn.Module], writes: Callable[[nn.Module], Iterable[Tensor]] = lambda model: ()
) -> Iterator[None]:
    """Do the same as `atomic` for several models: if anything fails, all of them are left as they were."""
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(atomic(model, writes(model)))
        yield


class _Before:
    def __init__(self, model: nn.Module, writes: Iterable[Tensor]) -> None:
        self.model = model
        self.modules = [(module, type(module), _Contents(module.__dict__)) for module in modules_of(model)]
        self.flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
        record = state_of(model)
        elsewhere = [] if record is None else kept_elsewhere(model, record)
        self.values = [(tensor, tensor.detach().clone()) for tensor in (*writes, *elsewhere)]
        self.record = _contents_of(record)

    @torch.no_grad()
    def restore(self) -> None:
        for module, cls, contents in self.modules:
            if type(module) is not cls:
                exchange_class(module, cls)  # also in hooks of other libraries, which hold the class's forward method
            contents.restore()
        for contents in self.record:
            contents.restore()
        for parameter, learns, grad in self.flags:
            parameter.requires_grad_(learns)
            parameter.grad = grad
        for tensor, values in self.values:
            tensor.copy_(values)
        for module, _, _ in self.modules:
            if isinstance(module, CompiledDelta):
                module.refresh()


class _Contents:
    """A snapshot of a dictionary of attributes and of the containers in it."""

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes, self.items = attributes, dict(attributes)
        containers = [value for value in attributes.values() if type(value) in _CONTAINERS]
        self.empty = [value for value in containers if not value]  # most: a module has a dozen for hooks, each slow to copy
        self.filled = [(value, value.copy()) for value in containers if value]

    def restore(self) -> None:
        _refill(self.attributes, self.items)
        for container in self.empty:
            container.clear()
        for container, items in self.filled:
            _refill(container, items)


def _refill(container: Any, items: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(items)


def _contents_of(record: AdapterState | None) -> list[_Contents]:
    if record is None:
        return []
    return [_Contents(vars(part)) for part in (record, record.fused, *record.adapters.values())]
