"""The components of a pipeline, and the adapters in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loca_vision.model.state import AdapterState, state_of
from loca_vision.model.traversal import unwrap


def models_in(pipe: Any) -> dict[str, nn.Module]:
    """Return the pipeline's models by component, without the wrapper of `torch.compile`."""
    if not isinstance(getattr(pipe, "components", None), Mapping):
        raise TypeError(
            f"a {type(pipe).__name__} is not a pipeline; for a model by itself, use inject, load_adapter and save_adapter"
        )
    return {name: unwrap(model) for name, model in pipe.components.items() if isinstance(model, nn.Module)}


def adapted_in(pipe: Any) -> dict[str, tuple[nn.Module, AdapterState]]:
    """Return the models that have adapters, by component, each with its state."""
    found = ((name, model, state_of(model)) for name, model in models_in(pipe).items())
    return {name: (model, record) for name, model, record in found if record is not None}


def names_in(pipe: Any) -> list[str]:
    """Return the names of all adapters, in the order they were added."""
    return list(dict.fromkeys(name for _, record in adapted_in(pipe).values() for name in record.adapters))


def active_in(pipe: Any) -> list[str]:
    """Return the names of the active adapters, in order."""
    return list(dict.fromkeys(name for _, record in adapted_in(pipe).values() for name in record.active))


def fused_in(pipe: Any) -> set[str]:
    """Return the names of the adapters that are fused into any component."""
    return {name for _, record in adapted_in(pipe).values() for name in record.fused.adapters}


def check_names(pipe: Any, names: str | Sequence[str], *, allow_none: bool = False) -> list[str]:
    """Return the names as a list.

    Raises:
        ValueError: a name is unknown or repeated, or there is none and `allow_none` is False.
    """
    if names is None:
        raise ValueError("names=None: expected the name of an adapter, or a list of names")
    if isinstance(names, Mapping):
        raise ValueError(f"names={dict(names)!r}: expected a list of names; their weights are the next argument")
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in names_in(pipe):
            there = ", ".join(map(repr, names_in(pipe))) or "none"
            raise ValueError(f"no adapter {name!r} in the pipeline; it has {there}")
    if len(set(names)) < len(names):
        raise ValueError(f"names={names!r}: an adapter is named twice")
    if not names and not allow_none:
        raise ValueError("names=[]: name at least one adapter")
    return names


def components_to_change(pipe: Any, components: Sequence[str] | None) -> dict[str, tuple[nn.Module, AdapterState]]:
    """Return the named components, each of which must have adapters; by default all components with adapters.

    Raises:
        ValueError: there is no adapter in the pipeline, or in a named component.
    """
    there = adapted_in(pipe)
    if components is None:
        if not there:
            raise ValueError("the pipeline has no adapter; load one first")
        return there
    if isinstance(components, str) or not components:
        raise ValueError(f"components={components!r}: expected a list of names, such as ['unet']")
    for component in components:
        if component not in there:
            raise ValueError(f"components: {component!r} has no adapter; those with adapters are {', '.join(there) or 'none'}")
    return {component: there[component] for component in components}
