"""Methods by name: the decorator @kind, the table KINDS, and the methods that installed packages define."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import TypeVar

from loca_vision.messages import nearest
from loca_vision.methods.adapter_config import AdapterConfig

KINDS: dict[str, type[AdapterConfig]] = {}
GROUP = "loca_vision.methods"
"""The entry point group in which a package registers its methods: each method's name and the module or class defining it."""

_Config = TypeVar("_Config", bound=AdapterConfig)


def kind(cls: type[_Config]) -> type[_Config]:
    """Register a kind of adapter under its method's name, so that its files can be read.

    Raises:
        ValueError: another class already has that name.
    """
    known = KINDS.get(cls.method)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"method={cls.method!r}: {known.__module__}.{known.__qualname__} has that name")
    KINDS[cls.method] = cls
    return cls


def method_names() -> tuple[str, ...]:
    """Return the registered methods, and those of installed packages that have not been imported yet."""
    return tuple(dict.fromkeys((*KINDS, *(point.name for point in entry_points(group=GROUP)))))


def config_class(method: str) -> type[AdapterConfig]:
    """Return the class of a method that the user names, importing the installed package that defines it if necessary.

    A method named in a file is looked up in `KINDS` instead: reading a file imports no code.

    Raises:
        ValueError: there is no such method, or its package cannot be imported or does not define it.
    """
    if method not in KINDS:
        for point in entry_points(group=GROUP, name=method):
            try:
                point.load()
            except Exception as error:
                raise ValueError(
                    f"method={method!r}: {point.value}, installed for it, fails with {type(error).__name__}: {error}"
                ) from error
            if method not in KINDS:
                raise ValueError(f"method={method!r}: {point.value}, installed for it, defines no such method")
    if method not in KINDS:
        raise unknown_method(method, method_names())
    return KINDS[method]


def unknown_method(method: str, known: tuple[str, ...]) -> ValueError:
    """Return the error to raise for an unknown method; it suggests similar names and says how to register another method."""
    return ValueError(
        f"method={method!r}: it is unknown here{nearest(method, known)}; there are {', '.join(known)}, "
        "and --import names the module that defines another"
    )
