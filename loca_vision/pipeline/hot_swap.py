"""Replace one adapter by another in the same tensors, so that nothing is recompiled."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loca_vision.layers.targets import Target
from loca_vision.methods.update import Update
from loca_vision.model.activation import changing_active
from loca_vision.model.adapters import adapters
from loca_vision.model.conv_in import fit_conv_in
from loca_vision.model.state import Adapter, refuse_fused, state_of
from loca_vision.model.whole_tensors import adopt, keep_base
from loca_vision.offload import stored_at


def check_swap(model: nn.Module, name: str, placed: list[tuple[Target, Update]]) -> None:
    """Raise ValueError if the adapter `name` of this model cannot take these updates.

    Raises:
        ValueError: there is no such adapter, it is fused, or it lacks a projection or has too little room in it.
    """
    record = state_of(model)
    assert record is not None
    refuse_fused(record, [name])
    present = adapters(model, name)
    for target, update in placed:
        if target.name not in present:
            raise ValueError(f"{target.name} is not among the projections of adapter {name!r}, which it should replace")
        present[target.name].check_fits(update, target.name)


@torch.no_grad()
def swap(model: nn.Module, name: str, adapter: Adapter, placed: list[tuple[Target, Update]]) -> None:
    """Replace the updates and whole tensors of the adapter `name`; projections without a new update become inactive."""
    record = state_of(model)
    assert record is not None
    new = {target.name: update for target, update in placed}
    with changing_active(model, record):
        old = record.adapters[name].modules_to_save
        for key, value in adapter.modules_to_save.items():
            keep_base(model, record, key)
            if key in old and old[key].shape == value.shape:  # keep the object, which compiled code may refer to
                adapter.modules_to_save[key] = old[key].copy_(value)
        record.adapters[name] = adapter
        fit_conv_in(model, record)
        for projection, update in adapters(model, name).items():
            update.copy_from(new.get(projection))


def written_by_swap(model: nn.Module, name: str) -> list[Tensor]:
    """Return the tensors that `swap` writes in place."""
    record = state_of(model)
    assert record is not None
    adopt(model, record)
    own = [stored_at(update, key) for update in adapters(model, name).values() for key in update.state_dict()]
    return [*own, *record.adapters[name].modules_to_save.values()]
