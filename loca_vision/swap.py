"""Another adapter in the place of one: the same tensors with other values, so that nothing is compiled anew."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from loca_vision.config import PARTS
from loca_vision.inject import adapters
from loca_vision.offload import stored, stored_at
from loca_vision.record import Adapter, changing, park, record_of, refuse_fused
from loca_vision.spectrum import Spectrum
from loca_vision.targets import Target, find_targets


def check_swap(model: nn.Module, name: str, placed: list[tuple[Target, Spectrum]]) -> None:
    """Raise where the adapter `name` of this model has no place for these spectra.

    Raises:
        ValueError: no such adapter, it is fused, or it lacks a projection or has too little room in it.
    """
    record = record_of(model)
    assert record is not None
    refuse_fused(record, [name])
    present = adapters(model, name)
    for target, spectrum in placed:
        if target.name not in present:
            raise ValueError(f"{target.name} is not among the projections of adapter {name!r}, which it should replace")
        room = len(present[target.name].coefficients)
        if spectrum.count > room:
            raise ValueError(
                f"{target.name} has {spectrum.count} components and adapter {name!r} has room for {room}; "
                f"call enable_loca_hotswap before the first adapter is loaded, with {spectrum.count} or more"
            )


@torch.no_grad()
def swap(model: nn.Module, name: str, adapter: Adapter, placed: list[tuple[Target, Spectrum]]) -> None:
    """Put these spectra and whole tensors in the place of those of the adapter `name`; projections it has beyond them rest."""
    record = record_of(model)
    assert record is not None
    given = {target.name: spectrum for target, spectrum in placed}
    with changing(model, record):
        record.base = {key: stored_at(model, key).detach().clone() for key in adapter.whole} | record.base
        record.adapters[name] = adapter
        for projection, spectrum in adapters(model, name).items():
            _take_over(spectrum, given.get(projection))


@torch.no_grad()
def held(model: nn.Module, name: str) -> tuple[Adapter, list[tuple[Target, Spectrum]]]:
    """What `swap` would have to be given to bring the adapter `name` back as it is now."""
    record = record_of(model)
    assert record is not None
    park(model, record)
    old, present = record.adapters[name], adapters(model, name)
    targets = [target for target in find_targets(model, PARTS) if target.name in present]
    return replace(old, whole=dict(old.whole)), [(target, copy.deepcopy(present[target.name])) for target in targets]


def _take_over(spectrum: Spectrum, other: Spectrum | None) -> None:
    coefficients, locations = stored(spectrum, "coefficients"), stored(spectrum, "locations")
    coefficients.zero_()
    spectrum.count = other.count if other is not None else 0
    if other is not None:
        coefficients[: other.count] = other.coefficients[: other.count].to(coefficients.device)
        locations[: other.count] = other.locations[: other.count].to(locations.device)
        spectrum.scale, spectrum.difference, spectrum.final = other.scale, other.difference, other.final
