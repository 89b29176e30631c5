"""Wrap methods of third-party classes, and restore them exactly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

Method = Callable[..., Any]
_WRAPPED: WeakKeyDictionary[Method, tuple[Any, bool]] = WeakKeyDictionary()  # what each wraps, and whether its class defined it


def wrap_methods(cls: type, names: Sequence[str], wrapper_of: Callable[[Method], Method], *, alone: bool = False) -> None:
    """Wrap the class's methods and class methods of these names, unless they are wrapped already.

    Args:
        wrapper_of: makes the wrapper of a function.
        alone: also wrap inherited methods that are wrapped already, for a class that must stay wrapped if its bases do not.
    """
    for name in names:
        there, own = inspect.getattr_static(cls, name, None), name in vars(cls)
        function = _function(there)
        if function is None or (function in _WRAPPED and (own or not alone)):
            continue
        original = _WRAPPED[function][0] if function in _WRAPPED else there
        wrapper = wrapper_of(_function(original))  # type: ignore[arg-type]
        _WRAPPED[wrapper] = original, own
        setattr(cls, name, classmethod(wrapper) if isinstance(original, classmethod) else wrapper)


def unwrap_methods(cls: type, names: Sequence[str]) -> None:
    """Undo what `wrap_methods` did to this class; methods that other code has replaced since are left alone."""
    for name in names:
        function = _function(vars(cls).get(name))
        if function is not None and function in _WRAPPED:
            original, own = _WRAPPED[function]
            if own:
                setattr(cls, name, original)
            else:
                delattr(cls, name)


def with_subclasses(cls: type) -> Iterator[type]:
    """Yield the class and all its subclasses."""
    yield cls
    below: type
    for below in type.__subclasses__(cls):
        yield from with_subclasses(below)


def _function(member: Any) -> FunctionType | None:
    function = member.__func__ if isinstance(member, classmethod) else member
    return function if isinstance(function, FunctionType) else None
