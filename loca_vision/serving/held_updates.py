"""The updates of an adapter file as calls that mix adapters hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loca_vision.functional.sample_spectra import PackedSpectrum, packed_cosines
from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.layers.targets import Target, readable_weight
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.packed_update import PackedUpdate
from loca_vision.methods.spectrum import Spectrum
from loca_vision.methods.update import Update
from loca_vision.offload import device_for

Held = Update | PackedUpdate


def held_updates(config: AdapterConfig, targets: Sequence[Target], tensors: Mapping[str, Tensor]) -> list[Held]:
    """An update for each target, from checked tensors; sums of cosines packed, others as they are.

    Raises:
        ValueError: an update depends on a weight that cannot be read.
    """
    with ordinary_tensors():
        first = config.from_tensors(targets[0].name, targets[0].shape, tensors)
        if type(first) is Spectrum:  # and not a subclass, which may be another sum
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
    by_shape: dict[tuple[int, int], list[Target]] = {}
    for target in targets:
        by_shape.setdefault(target.shape, []).append(target)
    found: dict[str, PackedSpectrum] = {}
    for shape, alike in by_shape.items():
        values, cells = ([tensors[f"{target.name}.{key}"] for target in alike] for key in ("coefficients", "locations"))
        found |= zip((target.name for target in alike), packed_cosines(values, cells, shape, scale), strict=True)
    return [PackedUpdate(_on(found[target.name], device_for(target.layer))) for target in targets]


def _on(spectrum: PackedSpectrum, device: torch.device) -> PackedSpectrum:
    if device.type == "cpu":
        return spectrum
    return replace(spectrum, coefficients=spectrum.coefficients.to(device), index=spectrum.index.to(device))
