"""Find the adapters for a call that mixes them: in the model itself, or in a store outside it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import nn

from loca_vision.layers.attention_layouts import part_of_name
from loca_vision.layers.mixtures import HeldAdapter, PlacedUpdate, handle_of
from loca_vision.messages import nearest
from loca_vision.model.hosts import WALKING
from loca_vision.model.state import AdapterState, state_of
from loca_vision.model.traversal import sites, unwrap
from loca_vision.model.whole_tensors import adopt

Taken = Mapping[nn.Module, HeldAdapter]


class AdapterSource(Protocol):
    """A store that holds adapters for models, outside the models."""

    def names(self) -> Sequence[str]:
        """Return the names of all its adapters."""

    def __contains__(self, name: object) -> bool: ...

    def held(self, name: str) -> Taken:
        """Return one adapter, as its part for each model that it has anything for."""


_SOURCES: weakref.WeakKeyDictionary[nn.Module, AdapterSource] = weakref.WeakKeyDictionary()


def give_source(model: nn.Module, source: AdapterSource | None) -> None:
    """Let calls of the model also use adapters from this source; None removes the source."""
    if source is None:
        _SOURCES.pop(unwrap(model), None)
    else:
        _SOURCES[unwrap(model)] = source


def source_of(model: nn.Module) -> AdapterSource | None:
    return _SOURCES.get(unwrap(model))


def has_adapter(model: nn.Module, name: str) -> bool:
    """Whether calls of the model may mix this adapter, be it the model's own or one of its store."""
    record, source = state_of(model), source_of(model)
    return (record is not None and name in record.adapters) or (source is not None and name in source)


def names_for(model: nn.Module) -> list[str]:
    """Return the names of all adapters that calls of the model may mix."""
    record, source = state_of(model), source_of(model)
    return list(dict.fromkeys([*(record.adapters if record else ()), *(source.names() if source else ())]))


def held_adapters(
    model: nn.Module, names: Sequence[str], taken: dict[tuple[int, str], Taken] | None = None
) -> dict[str, HeldAdapter]:
    """Return these adapters by name, from the model itself or from its store.

    Args:
        model: the model.
        names: the names of the adapters.
        taken: what the call has already taken from stores, so that all its models use the same version of a file.

    Raises:
        ValueError: neither the model nor its store has an adapter of a name; the message suggests the nearest one.
    """
    model = unwrap(model)
    record, source = state_of(model), source_of(model)
    if record is None and source is None:
        raise ValueError(f"{type(model).__name__} has no adapter; inject or load one first")
    own = [name for name in names if record is not None and name in record.adapters]
    found = {} if record is None else _own(model, record, own)
    taken = {} if taken is None else taken
    for name in names:
        if name in found:
            continue
        if source is None or name not in source:
            there = names_for(model)
            shown = ", ".join(map(repr, there[:8])) + (f" and {len(there) - 8} more" if len(there) > 8 else "")
            raise ValueError(f"no adapter {name!r} in the model; it has {shown or 'none'}{nearest(name, there)}")
        key = id(source), name
        if key not in taken:
            taken[key] = source.held(name)
        found[name] = taken[key].get(model) or HeldAdapter(name, {})  # a file may hold nothing for this model
    return found


def _own(model: nn.Module, record: AdapterState, names: Sequence[str]) -> dict[str, HeldAdapter]:
    if not names:
        return {}
    adopt(model, record)
    updates: dict[str, dict[int, list[PlacedUpdate]]] = {name: {} for name in names}
    with WALKING:
        places = sites(model)
    for site in places:
        for slot, update in site.updates.entries():
            if slot.adapter in updates:
                placed = PlacedUpdate(slot.rows, update, part_of_name(slot.projection) != "linear")
                updates[slot.adapter].setdefault(handle_of(site.updates), []).append(placed)
    return {name: HeldAdapter(name, updates[name], dict(record.adapters[name].modules_to_save)) for name in names}
