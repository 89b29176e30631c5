"""Fusing adapters into the weights for a while: what the weights were is kept, and put back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loca_vision.record import Strength, record_of, strengthen
from loca_vision.weights import original, weights, write_weights

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fuse(model: nn.Module, strengths: Mapping[str, Strength], *, check: bool = False) -> None:
    """Write W + the updates of these adapters, and of those fused before, into the weights; rounded once, from the first W.

    Args:
        strengths: of the adapters to fuse; those fused before keep theirs.
        check: refuse before anything is written where a weight would not be finite.

    Raises:
        ValueError: a weight that is quantised or otherwise cannot be written, or a change by another hand since the last fuse.
    """
    record = record_of(model)
    assert record is not None
    refuse_changed(model)
    together = dict(strengths) | record.fused.adapters
    touched = [w for w in weights(model) if not w.stack]
    kept = {w.path: w.tensor.detach().to("cpu", copy=True) for w in touched if w.path not in record.fused.originals}
    originals = kept | record.fused.originals
    write_weights(model, together, originals, check=check)
    record.fused.adapters, record.fused.originals = together, originals
    record.fused.marks = {w.path: _checksum(w.tensor) for w in touched}
    strengthen(model, record)


@torch.no_grad()
def unfuse(model: nn.Module) -> None:
    """Put the weights back as they were before the first fuse; the adapters act as they did.

    Raises:
        ValueError: somebody else has written to a weight since.
    """
    record = record_of(model)
    if record is None or not record.fused.adapters:
        return
    refuse_changed(model)
    for weight in weights(model):
        weight.tensor.copy_(original(weight, model, record.fused.originals))
    record.fused = type(record.fused)()
    strengthen(model, record)


def refuse_changed(model: nn.Module) -> None:
    """Raise where a fused weight holds something else than what `fuse` wrote, as after another tool's fuse."""
    record = record_of(model)
    fused = record.fused if record else None
    for weight in weights(model) if fused and fused.adapters else ():
        if weight.stack or weight.path not in fused.originals:  # type: ignore[union-attr]
            continue
        same_dtype = weight.tensor.dtype == fused.originals[weight.path].dtype  # type: ignore[union-attr]
        if same_dtype and _checksum(weight.tensor) != fused.marks[weight.path]:  # type: ignore[union-attr]
            raise ValueError(
                f"{weight.path} has been changed since LoCA was fused into it; undo that first (LoRA: unfuse_lora), "
                "or the change would be lost"
            )


def _checksum(tensor: Tensor) -> int:
    """Of the bits, so that it is the same on every device."""
    return int(tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
