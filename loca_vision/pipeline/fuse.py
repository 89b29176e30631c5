"""Fuse adapters into the weights; the original weights are kept and restored bit for bit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.checks import finite_number
from loca_vision.model.activation import changing_active
from loca_vision.model.atomic import atomic, atomic_all
from loca_vision.model.merge import Weight, acting_at, stacked, weights, write_weights
from loca_vision.model.remove import remove
from loca_vision.model.state import Fused, Strength, state_of
from loca_vision.pipeline.components import adapted_in, check_names, components_to_change

_LOG = logging.getLogger(__name__)
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def fuse_components(
    pipe: Any, components: Sequence[str] | None, *, scale: float, check: bool, adapter_names: Sequence[str] | None
) -> None:
    """Implement `LoCALoaderMixin.fuse_loca`, in all components or, if one fails, in none."""
    factor = finite_number(scale, "scale")
    states = components_to_change(pipe, components)
    names = None if adapter_names is None else check_names(pipe, adapter_names)
    wanted: dict[str, dict[str, Strength]] = {}
    for component, (_, record) in states.items():
        fusing = [name for name in (names or record.active) if name in record.adapters]
        if fusing and not record.enabled:
            raise ValueError("the adapters are disabled; call enable_loca first")
        new = [name for name in fusing if name not in record.fused.adapters]
        wanted[component] = {name: _times(record.active.get(name, 1.0), factor) for name in new}
    if not any(wanted.values()) and not any(record.fused.adapters for _, record in states.values()):
        raise ValueError("no adapter is active, so there is nothing to fuse; call set_loca_adapters first")
    changing = [(model, wanted[component]) for component, (model, _) in states.items() if wanted[component]]
    with atomic_all((model for model, _ in changing), written):
        for model, strengths in changing:
            _fuse(model, strengths, check=check)


def unfuse_components(pipe: Any, components: Sequence[str] | None) -> None:
    """Implement `LoCALoaderMixin.unfuse_loca`."""
    states = components_to_change(pipe, components) if components is not None else adapted_in(pipe)
    changing = [model for model, record in states.values() if record.fused.adapters]
    with atomic_all(changing, written):
        for model in changing:
            _unfuse(model)


def unload_components(pipe: Any) -> None:
    """Implement `LoCALoaderMixin.unload_loca_weights`."""
    records = dict(adapted_in(pipe).values())
    fused = {model: written(model) for model, record in records.items() if record.fused.adapters}
    with atomic_all(records, lambda model: [*records[model].first.values(), *fused.get(model, ())]):
        for model in records:
            if model in fused:
                _unfuse(model)
            remove(model)


def _times(strength: Strength, factor: float) -> Strength:
    return {name: s * factor for name, s in strength.items()} if isinstance(strength, Mapping) else strength * factor


def fuse(model: nn.Module, strengths: Mapping[str, Strength], *, check: bool = False) -> None:
    """Write W plus the updates of these adapters, and of those fused before, into the weights, rounding once.

    Args:
        strengths: the strengths of the adapters to fuse; those fused before keep theirs.
        check: refuse, before anything is written, if a weight would not be finite.

    Raises:
        ValueError: a weight is quantised or cannot be written for another reason. The weights stay as they were.
    """
    with atomic(model, written(model)):
        _fuse(model, strengths, check=check)


@torch.no_grad()
def _fuse(model: nn.Module, strengths: Mapping[str, Strength], *, check: bool) -> None:
    record = state_of(model)
    assert record is not None
    before = record.fused.adapters
    if before:
        _unfuse(model)
    originals = {w.path: w.tensor.detach().to("cpu", copy=True) for w in weights(model) if not w.stack}
    write_weights(model, {**strengths, **before}, check=check)
    with changing_active(model, record):
        marks = {w.path: _checksum(w.tensor) for w in weights(model) if not w.stack}
        record.fused = Fused({**strengths, **before}, originals, marks)


def written(model: nn.Module) -> list[Tensor]:
    """Return the weights that fusing and unfusing write.

    Raises:
        ValueError: one of them is quantised or cannot be written for another reason.
    """
    return [weight.tensor for weight in weights(model)]


def unfuse(model: nn.Module) -> None:
    """Restore the weights from before the first fuse; active adapters act as before.

    If other code has changed a weight since, such as a LoRA fused later, that change is kept: the update is subtracted, which
    is exact only up to rounding, and the log says so.
    """
    record = state_of(model)
    if record is not None and record.fused.adapters:
        with atomic(model, written(model)):
            _unfuse(model)


@torch.no_grad()
def _unfuse(model: nn.Module) -> None:
    record = state_of(model)
    assert record is not None
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
    """Restore one weight, and return whether that was exact because no other code has written to it."""
    now = weight.tensor
    if weight.path not in fused.originals:
        return True
    kept = fused.originals[weight.path]
    before = kept.to(now.device, now.dtype)
    if now.dtype == kept.dtype and _checksum(now) == fused.marks[weight.path]:
        now.copy_(before)
        return True
    # the model may have been cast since
    written = weight.effective_weight.sum(kept.to(now.device)).to(now.dtype)
    exact = torch.equal(now, written)
    now.copy_(before if exact else now.float() - (written.float() - before.float()))
    return exact


def _checksum(tensor: Tensor) -> int:
    """Return a sum of the bits, which is the same on every device."""
    return int(tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))
