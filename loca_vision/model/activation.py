"""Activate adapters, and put the tensors that they train as a whole into the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from loca_vision.layers.effective_weight import EffectiveWeight
from loca_vision.layers.weight_updates import WeightUpdates
from loca_vision.methods.update import Update
from loca_vision.model.state import AdapterState, Strength
from loca_vision.model.traversal import all_updates, modules_of, sites, unwrap
from loca_vision.model.whole_tensors import adopt, load_tensors


def active_updates(model: nn.Module) -> list[Update]:
    """Return the updates of active adapters, and updates that belong to no adapter."""
    entries = [(site.updates, *pair) for site in sites(model) for pair in site.updates.entries()]
    idle = {id(update) for updates, slot, update in entries if slot.adapter not in updates.strengths}
    return [update for update in all_updates(model) if id(update) not in idle]


def trainable_updates(model: nn.Module) -> list[Update]:
    """Return the active updates that have something to train.

    Raises:
        ValueError: the model has no trainable adapter.
    """
    found = [u for u in active_updates(model) if u.is_trained()]
    if not found:
        raise ValueError(f"{type(unwrap(model)).__name__} has no trainable adapter; inject one first")
    return found


@contextmanager
def changing_active(model: nn.Module, record: AdapterState) -> Iterator[None]:
    """Apply a change of the active adapters, made inside the context, to the model.

    On exit, the tensors trained as a whole and the strength of every update are set accordingly. If anything fails, everything
    acts as before.
    """
    adopt(model, record)
    before = record.active, record.enabled, record.fused
    try:
        yield
        load_tensors(model, record)
        strengthen(model, record)
    except BaseException:
        record.active, record.enabled, record.fused = before
        load_tensors(model, record)
        strengthen(model, record)
        raise


def activate(model: nn.Module, record: AdapterState, active: dict[str, Strength], *, enabled: bool | None = None) -> None:
    """Activate exactly these adapters; with `enabled` False, they act only once adapters are enabled again."""
    with changing_active(model, record):
        record.active = active
        record.enabled = record.enabled if enabled is None else enabled


def strengthen(model: nn.Module, record: AdapterState) -> None:
    """Set how strongly the updates of every weight act: as the record says, unless they are disabled or fused."""
    effective_weights = [module for module in modules_of(model) if isinstance(module, EffectiveWeight)]
    for updates in effective_weights:
        if isinstance(updates, WeightUpdates):
            updates.strengths = strengths_at(updates, record.effective)
    for weight in effective_weights:
        weight.refresh()


def strengths_at(updates: WeightUpdates, strengths: Mapping[str, Strength]) -> dict[str, float]:
    """Return how strongly each of these adapters acts on one weight."""
    found: dict[str, float] = {}
    for slot in updates.slots:
        if slot.adapter in strengths:
            strength = strengths[slot.adapter]
            found[slot.adapter] = strength[slot.projection] if isinstance(strength, Mapping) else strength
    return found
