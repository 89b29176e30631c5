"""The adapters of a model: which there are, which are active, and how strongly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loca_vision.checks import as_number
from loca_vision.model.activation import activate
from loca_vision.model.state import AdapterState, Strength, refuse_fused, state_of
from loca_vision.model.traversal import sites, unwrap


def adapters(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """The updates of one adapter by projection, in the order of the model's modules: of LoCA, each a `Spectrum`.

    Raises:
        ValueError: no such adapter.
    """
    _known(_record(model), name)
    entries = (entry for site in sites(model) for entry in site.updates.entries())
    return {slot.projection: update for slot, update in entries if slot.adapter == name}


def set_adapters(
    model: nn.Module, names: str | Sequence[str], weights: float | Sequence[float] | Mapping[str, float] | None = None
) -> None:
    """Let these adapters act, with these weights (1.0 each by default), and no others. An empty sequence: the base model.

    Whole tensors (a classifier head) come from the last adapter named that has any.

    Raises:
        ValueError: an unknown or repeated name, a weight that is not finite, or another number of weights than names.
    """
    record = _record(model)
    if isinstance(names, Mapping):
        raise ValueError(f"names={dict(names)!r}: expected a sequence of names; their weights are the next argument")
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        _known(record, name)
    if len(set(names)) < len(names):
        raise ValueError(f"names={names!r}: an adapter is named twice")
    refuse_fused(record, names or record.fused.adapters)  # the base model is not to be had then
    strengths: list[Strength] = [*_strengths(names, weights)]
    activate(unwrap(model), record, dict(zip(names, strengths, strict=True)), enabled=True)


def _strengths(names: list[str], weights: Any) -> list[float]:
    """One finite number for each name, in whichever form they came."""
    if weights is None or _is_single(weights):
        weights = [1.0 if weights is None else weights] * len(names)
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"weights={dict(weights)!r}: expected one weight for each of {names!r}")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise ValueError(f"weights={list(weights)!r}: {len(weights)} weights for {len(names)} adapters")
    numbers = [as_number(weight) for weight in weights]
    if None in numbers:
        raise ValueError(f"weights={list(weights)!r}: a weight is a finite number")
    return numbers  # type: ignore[return-value]


def _is_single(weights: Any) -> bool:
    return isinstance(weights, str) or not hasattr(weights, "__len__") or getattr(weights, "shape", None) == ()


def active_adapters(model: nn.Module) -> dict[str, Strength]:
    """The adapters that act, and how strongly: a number, or a number for each projection; empty for a model without any."""
    record = state_of(model)
    return dict(record.active) if record else {}


def _record(model: nn.Module) -> AdapterState:
    record = state_of(model)
    if record is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has no adapter; inject or load one first")
    return record


def _known(record: AdapterState, name: str) -> str:
    if name not in record.adapters:
        raise ValueError(f"no adapter {name!r} in the model; it has {', '.join(map(repr, record.adapters))}")
    return name
