"""Remove an adapter from a model, or merge it into the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from loca_vision.layers.adapted_attention import AdaptedAttention, restore_attention
from loca_vision.layers.adapted_linear import AdaptedLayer, restore
from loca_vision.layers.mixtures import is_mixed
from loca_vision.layers.weight_updates import WeightUpdates
from loca_vision.model.activation import activate
from loca_vision.model.adapters import _known, _record
from loca_vision.model.atomic import atomic
from loca_vision.model.base_checkpoint import save_as_before
from loca_vision.model.call_scale import forget_call_settings
from loca_vision.model.conv_in import WEIGHT, fit_conv_in
from loca_vision.model.merge import acting_at, weights, write_weights
from loca_vision.model.sharding import refuse_sharded
from loca_vision.model.state import AdapterState, end_record, refuse_fused
from loca_vision.model.traversal import sites, unwrap
from loca_vision.model.watching import unwatch
from loca_vision.model.whole_tensors import adopt, restore_first


def remove(model: nn.Module, name: str | None = None, *, merge: bool = False) -> None:
    """Remove one adapter, or all of them, from the model.

    Without `merge`, the base is restored bit for bit, including the head, a narrower `conv_in` and the statistics of batch
    normalisation. With `merge`, the active updates are merged into the weights (rounded once to their dtype), and a trained
    head or `conv_in` stays unless a remaining active adapter has its own. After the last adapter is removed, every layer has
    its original class again, and parameters are as trainable as before the first adapter. Parameters other than the head that
    the user made trainable since `inject` keep their values.

    Args:
        model: a model with adapters.
        name: the adapter to remove; None for all.
        merge: whether to merge the active updates into the weights.

    Raises:
        ValueError: the model has no such adapter, `merge` is used for a named adapter that is not active, `merge` is used
            while a `per_sample` context is open, an adapter is fused, or the model is sharded.
    """
    model = unwrap(model)
    record = _record(model)
    refuse_sharded(model, "save the adapter, and remove or merge it in a model made as it was")
    names = list(record.adapters) if name is None else [_known(record, name)]
    refuse_fused(record, names)
    if merge and name is not None and name not in record.active:
        raise ValueError(f"adapter {name!r} does not act, so there is nothing to merge; call set_adapters first")
    if merge and is_mixed(model):
        raise ValueError("a per_sample context of the model is open, which would count what is merged twice: merge after it")
    acting = [n for n in names if n in record.active] if merge else []
    with atomic(model, [*_written_by_merging(model, record, acting), *record.first.values()]):
        if acting:
            _merge(model, record, acting)
        _take_out(model, record, names)


def _take_out(model: nn.Module, record: AdapterState, names: list[str]) -> None:
    for site in sites(model):
        for gone in names:
            site.updates.discard(gone)
    for host in dict.fromkeys(site.host for site in sites(model)):
        release(host)
    activate(model, record, {n: weight for n, weight in record.active.items() if n not in names})
    for gone in names:
        del record.adapters[gone]
    fit_conv_in(model, record)
    if not record.adapters:
        restore_first(model, record)
        end_record(model)
        if not any(site.updates.hosts for site in sites(model)):
            forget_call_settings(model)
            if not is_mixed(model):  # the hooks of an open context must stay to report that its adapters are gone
                unwatch(model)
        save_as_before(model)


def release(host: AdaptedLayer | AdaptedAttention) -> None:
    """Restore the original class of a layer that has no update left."""
    if isinstance(host, AdaptedLayer):
        if not _is_needed(host.loca):
            restore(host)
    elif not any(map(_is_needed, host.loca.parts())):
        restore_attention(host)


def _is_needed(updates: WeightUpdates) -> bool:
    return bool(updates.slots) or updates.hosts


def _written_by_merging(model: nn.Module, record: AdapterState, names: list[str]) -> list[Tensor]:
    """Return the weights that merging these adapters writes to.

    Raises:
        ValueError: a weight is quantised or cannot be written for another reason.
    """
    if not names:
        return []
    with acting_at(model, {name: record.active[name] for name in names}):
        return [weight.tensor for weight in weights(model) if weight.effective_weight.active_updates()]


@torch.no_grad()
def _merge(model: nn.Module, record: AdapterState, names: list[str]) -> None:
    adopt(model, record)
    write_weights(model, {name: record.active[name] for name in names})
    if record.supplier in names:
        merged = record.adapters[record.supplier].modules_to_save
        record.base |= merged
        if WEIGHT in merged:
            record.narrow = None  # the wide weight is the model's own from now on
