"""The updates of an adapter file in the form that calls which mix adapters need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.layers.targets import Target, readable_weight
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.packed_update import PackedUpdate, Packing
from loca_vision.methods.spectrum import Spectrum
from loca_vision.methods.update import Update
from loca_vision.offload import device_for

Held = Update | PackedUpdate


def held_updates(config: AdapterConfig, targets: Sequence[Target], tensors: Mapping[str, Tensor]) -> list[Held]:
    """Return an update for each target, made from checked tensors: sums of cosines packed, others as they are.

    Raises:
        ValueError: an update depends on a weight that cannot be read.
    """
    with ordinary_tensors():
        first = config.from_tensors(targets[0].name, targets[0].shape, tensors)
        if type(first) is Spectrum:  # not a subclass, which may be another sum
            return _packed(first.scale, targets, tensors)
        made = [config.from_tensors(target.name, target.shape, tensors) for target in targets]
        for target, update in zip(targets, made, strict=True):
            if update.needs_weight:
                readable_weight(target.layer, target.name)
        return [
            update.requires_grad_(False).eval().to(device_for(target.layer))
            for target, update in zip(targets, made, strict=True)
        ]


def _packed(scale: float, targets: Sequence[Target], tensors: Mapping[str, Tensor]) -> list[Held]:
    alike: dict[tuple[Any, ...], list[Target]] = {}
    for target in targets:
        alike.setdefault((target.shape, device_for(target.layer)), []).append(target)
    found: dict[str, PackedUpdate] = {}
    for (shape, device), own in alike.items():
        values, cells = ([tensors[f"{target.name}.{key}"] for target in own] for key in ("coefficients", "locations"))
        packing = Packing(values, cells, shape, scale, device)
        found |= {target.name: PackedUpdate(packing, number) for number, target in enumerate(own)}
    return [found[target.name] for target in targets]
