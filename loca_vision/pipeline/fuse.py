"""Fusing adapters into the weights for a while: what the weights were is kept, and put back bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from loca_vision.model.activation import changing_active
from loca_vision.model.merge import Weight, acting_at, stacked, weights, write_weights
from loca_vision.model.state import Fused, Strength, state_of

_LOG = logging.getLogger(__name__)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def fuse(model: nn.Module, strengths: Mapping[str, Strength], *, check: bool = False) -> None:
    """Write W + the updates of these adapters, and of those fused before, into the weights; rounded once.

    Args:
        strengths: of the adapters to fuse; those fused before keep theirs.
        check: refuse before anything is written where a weight would not be finite.

    Raises:
        ValueError: a weight that is quantised or otherwise cannot be written. The weights are as they were then.
    """
    record = state_of(model)
    assert record is not None
    before = record.fused.adapters
    unfuse(model)
    originals = {w.path: w.tensor.detach().to("cpu", copy=True) for w in weights(model) if not w.stack}
    try:
        write_weights(model, {**strengths, **before}, check=check)
    except BaseException:
        for weight in weights(model):
            weight.tensor.copy_(stacked(model, weight) if weight.stack else originals[weight.path])
        if before:
            fuse(model, before)
        raise
    with changing_active(model, record):
        marks = {w.path: _checksum(w.tensor) for w in weights(model) if not w.stack}
        record.fused = Fused({**strengths, **before}, originals, marks)


@torch.no_grad()
def unfuse(model: nn.Module) -> None:
    """Put the weights back as they were before the first fuse; those adapters that are active act beside them.

    Where another hand has changed a weight since, as a LoRA that was fused later, its change stays: then the update is taken
    away again, which is exact to rounding only, and said in the log.
    """
    record = state_of(model)
    if record is None or not record.fused.adapters:
        return
    with acting_at(model, record.fused.adapters):
        changed = [w.path for w in weights(model) if not w.stack and not _restore(w, record.fused)]
    for weight in weights(model):
        if weight.stack:
            weight.tensor.copy_(stacked(model, weight))
    with changing_active(model, record):
        record.fused = Fused()
    if changed:
        _LOG.warning(
            "%d weights had been changed since LoCA was fused; unfused, they keep that change, up to rounding", len(changed)
        )


def _restore(weight: Weight, fused: Fused) -> bool:
    """Whether it could be done exactly: nobody else has written to the weight."""
    now = weight.tensor
    if weight.path not in fused.originals:
        return True
    kept = fused.originals[weight.path]
    before = kept.to(now.device, now.dtype)
    if now.dtype == kept.dtype and _checksum(now) == fused.marks[weight.path]:
        now.copy_(before)
        return True
    written = weight.effective_weight.sum(kept.to(now.device)).to(
        now.dtype
    )  # in a precision the model has been brought to since
    exact = torch.equal(now, written)
    now.copy_(before if exact else now.float() - (written.float() - before.float()))
    return exact


def _checksum(tensor: Tensor) -> int:
    """Of the bits, so that it is the same on every device."""
    return int(tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
