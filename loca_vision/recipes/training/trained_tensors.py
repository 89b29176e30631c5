"""What training changes in a model, and a check that everything else is unchanged."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.model.traversal import all_updates


def has_locations(model: nn.Module) -> bool:
    """Return whether there is anything for an alternating schedule to move."""
    return any(update.location_parameters() for update in all_updates(model))


def trained_tensors(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return what training changes, by name: the optimiser's parameters, and buffers such as running statistics."""
    moved = {id(parameter) for group in groups for parameter in group["params"]}
    kept = model.state_dict()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in kept}
    return {name: p for name, p in model.named_parameters() if id(p) in moved} | buffers


def checksum(model: nn.Module, trained: Mapping[str, Tensor]) -> int:
    """Return a checksum of everything that is not trained, so that a run continues with the weights it began with."""
    total = 0
    for name, value in model.named_parameters():
        if name not in trained:
            for part in _stored(value.detach()):
                data: Any = part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                total = zlib.crc32(data, total)
    return total


def _stored(value: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that a tensor consists of: bits and scales of a quantised one, otherwise the tensor itself."""
    if not hasattr(value, "__tensor_flatten__"):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from _stored(getattr(value, name))
