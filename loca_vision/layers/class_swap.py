"""Replace the class of a module in place with an adapted one, and mark methods that must not be traced."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


class Adapted(nn.Module):
    """A mixin for the class of a module that is replaced in place; copying and pickling preserve the module.

    Attributes:
        original_class: the class that the module had before and that is restored in the end.
    """

    original_class: type[nn.Module]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Create a layer of the original class, without adapter: peft creates layers of the class of the one it wraps."""
        return cls.original_class(*args, **kwargs)

    @classmethod
    def members(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Return additional members of the adapted class for `original`."""
        return {}

    def kept_state(self) -> dict[str, Any]:
        """Return the state that goes into a copy or a pickle."""
        return self.__dict__.copy()

    def __prepare_scriptable__(self) -> nn.Module:
        """Raise TypeError for torch.jit.script, which would put a module returned here into the model in place of the layer."""
        raise TypeError(
            f"{self.original_class.__name__} has an adapter, which torch.jit.script cannot compile: script a merged copy "
            "(copy.deepcopy, then remove(copy, merge=True)), or use torch.jit.trace or torch.export"
        )

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (type(self).__bases__[0], self.original_class), self.kept_state()


_classes: dict[tuple[type[Adapted], type[nn.Module]], type[nn.Module]] = {}


def adapted_class(mixin: type[Adapted], original: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass of `original` with this mixin; there is one for each pair."""
    if (mixin, original) not in _classes:
        about = {"original_class": original, "__module__": original.__module__, "__doc__": original.__doc__}
        body = about | mixin.members(original)
        _classes[mixin, original] = type(f"Adapted{original.__name__}", (mixin, original), body)
    return _classes[mixin, original]


def _empty(mixin: type[Adapted], original: type[nn.Module]) -> nn.Module:
    empty: nn.Module = object.__new__(adapted_class(mixin, original))
    return empty


def exchange_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Replace the class of a module in place, including a `forward` of the old class that hooks hold or have left behind.

    These are the hooks of accelerate and diffusers.
    """
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
    """Run the method eagerly when `torch.compile` traces a call of it, and put nothing of it into the graph.

    This does the same as `torch.compiler.assume_constant_result` without importing the compiler, which takes a second.
    """
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return method
