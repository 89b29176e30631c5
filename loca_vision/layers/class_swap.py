"""Exchanging the class of a module in place for one that is adapted; a mark for methods of such classes."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class Adapted(nn.Module):
    """A mixin for the class of a module that is exchanged in place; it comes back from a copy or a pickle as it was.

    Attributes:
        original_class: what it was exchanged for, and is again in the end.
    """

    original_class: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new layer has no adapter: peft makes its own of the class of the one that it wraps."""
        return cls.original_class(*args, **kwargs)

    @classmethod
    def members(cls, original: type[nn.Module]) -> dict[str, Any]:
        """What else the class for `original` has."""
        return {}

    def kept_state(self) -> dict[str, Any]:
        """What goes into a copy or a pickle."""
        return self.__dict__.copy()

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks for. It would put the answer into the model, in the place of the layer."""
        raise TypeError(
            f"{self.original_class.__name__} has an adapter, which torch.jit.script cannot compile: script a merged copy "
            "(copy.deepcopy, then remove(copy, merge=True)), or use torch.jit.trace or torch.export"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (type(self).__bases__[0], self.original_class), self.kept_state()


_classes: dict[tuple[type[Adapted], type[nn.Module]], type[nn.Module]] = {}


def adapted_class(mixin: type[Adapted], original: type[nn.Module]) -> type[nn.Module]:
    """The one subclass of `original` with this mixin."""
    if (mixin, original) not in _classes:
        about = {"original_class": original, "__module__": original.__module__, "__doc__": original.__doc__}
        body = about | mixin.members(original)
        _classes[mixin, original] = type(f"Adapted{original.__name__}", (mixin, original), body)
    return _classes[mixin, original]


def _empty(mixin: type[Adapted], original: type[nn.Module]) -> nn.Module:
    empty: nn.Module = object.__new__(adapted_class(mixin, original))
    return empty


def exchange_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Also where hooks of accelerate and diffusers keep the `forward` of the class that was there, or left it behind."""
    old = type(module).forward
    module.__class__ = new
    new_forward = MethodType(new.forward, module)
    registry = getattr(module, "_diffusers_hook", None)
    for holder, name in [(module, "_old_forward"), (module, "forward")] + [
        (reference, name) for reference in getattr(registry, "_fn_refs", ()) for name in ("forward", "original_forward")
    ]:
        if getattr(getattr(holder, name, None), "__func__", None) is old:
            setattr(holder, name, new_forward)


def once_while_traced(method: Callable[..., None]) -> Callable[..., None]:
    """Run the method for real when `torch.compile` traces a call of it, and put nothing of it into the graph.

    It is `torch.compiler.assume_constant_result`, without importing the compiler to say so, which takes a second.
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method
