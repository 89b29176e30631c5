"""Exchanging the class of a module in place; a mark for methods of such classes."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

from torch import nn


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
