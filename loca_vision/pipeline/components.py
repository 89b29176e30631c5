"""The components of a pipeline, and the adapters in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loca_vision.model.state import AdapterState, state_of
from loca_vision.model.traversal import unwrap


def models_in(pipe: Any) -> dict[str, nn.Module]:
    """Its models by component, out of the wrappers of compilation."""
    if not isinstance(getattr(pipe, "components", None), Mapping):
        raise TypeError(
            f"a {type(pipe).__name__} is no pipeline; for a model by itself there are inject, load_adapter, save_adapter"
        )
    return {name: unwrap(model) for name, model in pipe.components.items() if isinstance(model, nn.Module)}


def adapted_in(pipe: Any) -> dict[str, tuple[nn.Module, AdapterState]]:
    """Those that have adapters, with their records."""
    found = ((name, model, state_of(model)) for name, model in models_in(pipe).items())
    return {name: (model, record) for name, model, record in found if record is not None}


def names_in(pipe: Any) -> list[str]:
    return list(dict.fromkeys(name for _, record in adapted_in(pipe).values() for name in record.adapters))


def active_in(pipe: Any) -> list[str]:
    """The names of the active adapters, in order."""
    return list(dict.fromkeys(name for _, record in adapted_in(pipe).values() for name in record.active))


def fused_in(pipe: Any) -> set[str]:
    return {name for _, record in adapted_in(pipe).values() for name in record.fused.adapters}


def known(pipe: Any, given: str | Sequence[str], *, allow_none: bool = False) -> list[str]:
    if given is None:
        raise ValueError("names=None: the name of an adapter, or a list of names, is wanted")
    if isinstance(given, Mapping):
        raise ValueError(f"names={dict(given)!r}: names come as a list, their weights as the next argument")
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        if name not in names_in(pipe):
            there = ", ".join(map(repr, names_in(pipe))) or "none"
            raise ValueError(f"no adapter {name!r} in the pipeline; it has {there}")
    if len(set(names)) < len(names):
        raise ValueError(f"names={names!r}: an adapter is named twice")
    if not names and not allow_none:
        raise ValueError("names=[]: name at least one adapter")
    return names


def chosen(pipe: Any, components: Sequence[str] | None) -> dict[str, tuple[nn.Module, AdapterState]]:
    there = adapted_in(pipe)
    if components is None:
        if not there:
            raise ValueError("the pipeline has no adapter; load one first")
        return there
    if isinstance(components, str) or not components:
        raise ValueError(f"components={components!r}: a list of names is wanted, such as ['unet']")
    for component in components:
        if component not in there:
            raise ValueError(f"components: {component!r} has no adapter; those with adapters are {', '.join(there) or 'none'}")
    return {component: there[component] for component in components}
