"""The parts of a model that take part in a call that mixes adapters, and how they follow changes while a context is open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from loca_vision.layers.effective_weight import EffectiveWeight
from loca_vision.layers.mixtures import Mixture, handle_of, mix_also, mixture_of
from loca_vision.model.adapter_sources import source_of
from loca_vision.model.batch_size import watch_batches
from loca_vision.model.hosts import WALKING
from loca_vision.model.sharding import refuse_sharded
from loca_vision.model.state import state_of
from loca_vision.model.traversal import modules_of
from loca_vision.model.whole_per_sample import whole_mixtures


def mixtures_of(model: nn.Module, mixture: Mixture) -> dict[int, Mixture]:
    """Return the mixture of every part of the model that takes part in the call, by handle.

    Raises:
        ValueError: an adapter is fused into the weights, or trains a tensor that only one adapter at a time can supply.
    """
    record = state_of(model)
    if record is not None and record.fused.adapters:
        raise ValueError(f"adapter {next(iter(record.fused.adapters))!r} is fused into the weights; call unfuse_loca first")
    around = mixture_of(model)
    found = dict.fromkeys(around.handles if around is not None else (), mixture)  # a head mixed there may have none here
    with WALKING:
        refuse_sharded(model, "per_sample works on whole models, so enter it")
        found |= dict.fromkeys(_weights(model), mixture)
        found |= {watch_batches(model): mixture, **whole_mixtures(model, record, mixture)}
    mixture.handles, marks = tuple(found), _marks(model)

    def keep_up(model: nn.Module) -> None:
        if not _alike(marks, _marks(model)):
            _follow(model, mixture)

    mixture.keep_up = keep_up
    return found


def _weights(model: nn.Module) -> list[int]:
    with WALKING:
        return [handle_of(module) for module in modules_of(model) if isinstance(module, EffectiveWeight)]


def _marks(model: nn.Module) -> list[Any]:
    """Return everything that determines which parts the model has."""
    record = state_of(model)
    return [id(source_of(model)), *((*record.adapters.values(), *record.fused.adapters) if record is not None else ())]


def _alike(old: Sequence[Any], new: Sequence[Any]) -> bool:
    return len(old) == len(new) and all(a is b or (isinstance(a, (int, str)) and a == b) for a, b in zip(old, new, strict=True))


def _follow(model: nn.Module, mixture: Mixture) -> None:
    """Keep adapters that were added since the context began from acting on its samples.

    Raises:
        ValueError: an adapter has been fused in the meantime.
        RuntimeError: layers whose adapters this call needs have lost the last of them.
    """
    live = _weights(model)
    needed = {handle for entry in mixture.entries for adapter, _ in entry for handle in adapter.updates}
    if not needed <= set(live):
        raise RuntimeError(
            "per_sample: an adapter of this context was removed meanwhile, and its layers have no other: load it again, and "
            "enter per_sample anew"
        )
    mix_also(model, mixtures_of(model, mixture))
