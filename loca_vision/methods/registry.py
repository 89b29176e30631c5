"""The registered methods by name."""

from __future__ import annotations

from typing import TypeVar

from loca_vision.methods.adapter_config import AdapterConfig

KINDS: dict[str, type[AdapterConfig]] = {}

_Config = TypeVar("_Config", bound=AdapterConfig)


def kind(cls: type[_Config]) -> type[_Config]:
    """Make a kind of adapter known by its method's name, so that its files can be read.

    Raises:
        ValueError: another class has that name.
    """
    known = KINDS.get(cls.method)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"method={cls.method!r}: {known.__module__}.{known.__qualname__} has that name")
    KINDS[cls.method] = cls
    return cls
