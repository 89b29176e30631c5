"""Which adapters act, and whose whole tensors are in the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from loca_vision.layers.effective_weight import EffectiveWeight
from loca_vision.layers.weight_updates import WeightUpdates
from loca_vision.methods.update import Update
from loca_vision.model.state import AdapterState, Strength
from loca_vision.model.traversal import all_updates, modules_of, moved_by_training, own_tensors, sites
from loca_vision.offload import stored_at


def active_updates(model: nn.Module) -> list[Update]:
    """Every update but those of adapters that do not act."""
    entries = [(site.updates, *pair) for site in sites(model) for pair in site.updates.entries()]
    idle = {id(update) for updates, slot, update in entries if slot.adapter not in updates.strengths}
    return [update for update in all_updates(model) if id(update) not in idle]


@contextmanager
def changing_active(model: nn.Module, record: AdapterState) -> Iterator[None]:
    """Around a change of what acts: the whole tensors in the model, and how strongly every update acts, follow it."""
    store_live_tensors(model, record)
    try:
        yield
    finally:
        load_tensors(model, record)
        strengthen(model, record)


def activate(model: nn.Module, record: AdapterState, active: dict[str, Strength], *, enabled: bool | None = None) -> None:
    """Let exactly these adapters act, or, with `enabled` False, be the ones that will."""
    with changing_active(model, record):
        record.active = active
        record.enabled = record.enabled if enabled is None else enabled


def strengthen(model: nn.Module, record: AdapterState) -> None:
    """Tell every update how strongly it acts: as the record says, unless it is disabled or fused into the weights."""
    effective_weights = [module for module in modules_of(model) if isinstance(module, EffectiveWeight)]
    for updates in effective_weights:
        if isinstance(updates, WeightUpdates):
            updates.strengths = strengths_at(updates, record.effective)
    for reading in effective_weights:
        reading.refresh()


def strengths_at(updates: WeightUpdates, strengths: Mapping[str, Strength]) -> dict[str, float]:
    """How strongly each of these adapters acts on one weight."""
    found: dict[str, float] = {}
    for slot in updates.slots:
        if slot.adapter in strengths:
            strength = strengths[slot.adapter]
            found[slot.adapter] = strength[slot.projection] if isinstance(strength, Mapping) else strength
    return found


@torch.no_grad()
def claim_trained(record: AdapterState, tensors: dict[str, Tensor]) -> None:
    """Count what the user has made trainable since the last adapter came among that adapter's whole tensors."""
    forget_lost(record, tensors)
    if record.supplier:
        found = {name: t.detach().clone() for name, t in moved_by_training(tensors).items() if name not in record.base}
        record.adapters[record.supplier].modules_to_save |= found
        record.base |= {name: value.clone() for name, value in found.items()}


def forget_lost(record: AdapterState, tensors: dict[str, Tensor]) -> None:
    """Drop whole tensors that the model no longer has, or has in another shape: its head was exchanged."""
    for values in (record.base, *(adapter.modules_to_save for adapter in record.adapters.values())):
        for name in [n for n, value in values.items() if n not in tensors or tensors[n].shape != value.shape]:
            del values[name]


@torch.no_grad()
def store_live_tensors(model: nn.Module, record: AdapterState) -> None:
    """Keep the values that the supplying adapter has reached by now."""
    if not record.base:  # to look at every parameter takes milliseconds
        return
    forget_lost(record, own_tensors(model))
    if record.supplier:
        whole = record.adapters[record.supplier].modules_to_save
        whole.update({name: stored_at(model, name).detach().clone() for name in whole})


@torch.no_grad()
def load_tensors(model: nn.Module, record: AdapterState) -> None:
    """Put the supplying adapter's whole tensors into the model, and the model's own where it has none."""
    whole = record.adapters[record.supplier].modules_to_save if record.supplier else {}
    for name, own in record.base.items():
        stored_at(model, name).copy_(whole.get(name, own))
