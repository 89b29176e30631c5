"""Which adapters of a pipeline act, and how strongly in each component."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from loca_vision.model.activation import activate
from loca_vision.model.adapters import adapters
from loca_vision.model.state import AdapterState, Strength, refuse_fused
from loca_vision.pipeline.block_weights import block_strengths
from loca_vision.pipeline.components import adapted_in, check_names


def activate_adapters(pipe: Any, names: str | Sequence[str], weights: Any) -> None:
    """Implement `LoCALoaderMixin.set_loca_adapters`."""
    names = check_names(pipe, names, allow_none=True)
    weights = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
    if len(weights) != len(names):
        raise ValueError(f"weights={weights!r}: {len(weights)} weights for {len(names)} adapters")
    for name, weight in zip(names, weights, strict=True):
        _check_components(pipe, name, weight)
    strengths: dict[str, dict[str, Strength]] = {}
    for component, (model, record) in adapted_in(pipe).items():
        refuse_fused(record, names or record.fused.adapters)  # without names: the base model, which the weights no longer hold
        strengths[component] = {
            name: _strength(model, component, name, weight)
            for name, weight in zip(names, weights, strict=True)
            if name in record.adapters
        }
    activate_all(pipe, lambda component, record: strengths[component], enabled=True)


def activate_all(pipe: Any, active: Callable[[str, AdapterState], dict[str, Strength]], *, enabled: bool) -> None:
    """Change which adapters act in every component or, if one fails, in none.

    Args:
        active: returns the strengths of the active adapters in a component.
    """
    before = [(model, record, record.active, record.enabled) for model, record in adapted_in(pipe).values()]
    try:
        for component, (model, record) in adapted_in(pipe).items():
            activate(model, record, active(component, record), enabled=enabled)
    except BaseException:
        for model, record, was_active, was_enabled in before:
            activate(model, record, was_active, enabled=was_enabled)
        raise


def _check_components(pipe: Any, name: str, weight: Any) -> None:
    if isinstance(weight, Mapping):
        there = [component for component, (_, record) in adapted_in(pipe).items() if name in record.adapters]
        for component in weight:
            if component not in there:
                raise ValueError(f"weights: adapter {name!r} is not in {component!r}; it is in {', '.join(there)}")


def _strength(model: nn.Module, component: str, name: str, weight: Any) -> Strength:
    own = weight.get(component) if isinstance(weight, Mapping) else weight
    projections = list(adapters(model, name)) if isinstance(own, Mapping) else []
    return block_strengths(model, 1.0 if own is None else own, projections, f"weights[{component!r}]")
