"""Tensors that an adapter trains as a whole, such as a classifier head.

Every adapter has objects of its own for them, and so has the base; the model holds those of one supplier at a time. A switch
exchanges objects and never writes into them, so that a graph recorded before it keeps the values it was recorded with.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.model.state import AdapterState
from loca_vision.model.traversal import modules_of, moved_by_training, own_parameters, own_tensors
from loca_vision.offload import exchange, split_path, stored_at


def own_copy(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of the values: a parameter as trainable as `like`, if that is one, else a plain tensor."""
    with ordinary_tensors():
        values = tensor.detach().clone().to(like.dtype)
        return nn.Parameter(values, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else values


def held_at(model: nn.Module, key: str) -> Tensor:
    """The object in the model, which is a placeholder if the layer is offloaded."""
    module, name = split_path(model, key)
    held = module._parameters.get(name)
    return module._buffers[name] if held is None else held  # type: ignore[return-value]


def adopt(model: nn.Module, record: AdapterState) -> None:
    """Bring the record in step with the model, in which a user, a trainer or an offloader may have exchanged tensors.

    What the model holds belongs to the adapter that supplies it, otherwise to the base. What has become trainable since the
    last adapter came, a head that was put in later included, belongs to the last active adapter from now on.
    """
    if not record.base and not record.frozen:  # to look at every parameter takes milliseconds
        return
    tensors = own_tensors(model)
    supplied = record.adapters[record.supplier].modules_to_save if record.supplier else {}
    for key in [key for key in record.base if key not in tensors]:
        _forget(record, key)
    for key in list(record.base):
        owner = supplied if key in supplied else record.base
        if tensors[key].shape != owner[key].shape:  # the module was exchanged: the values before are of no use to anyone
            owner.pop(key)
            record.base.pop(key, None)
            record.first.pop(key, None)
        else:
            owner[key] = tensors[key] if _may_be_exchanged(tensors[key]) else own_copy(stored_at(model, key), tensors[key])
    for key, live in moved_by_training(tensors).items() if record.frozen and record.active else ():
        if key not in record.base:
            claim(model, record, next(reversed(record.active)), key, live)
    for key in {key for adapter in record.adapters.values() for key in adapter.modules_to_save} - record.base.keys():
        record.base[key] = own_copy(stored_at(model, key), tensors[key])


def claim(model: nn.Module, record: AdapterState, name: str, key: str, live: Tensor) -> None:
    """Let what the model holds belong to an adapter; the base gets a copy, if it has none."""
    if key not in record.base:
        record.base[key] = own_copy(stored_at(model, key), live)
        if _may_be_exchanged(live):
            record.first[key] = live
        record.adapters[name].modules_to_save[key] = live
    else:
        record.adapters[name].modules_to_save[key] = own_copy(stored_at(model, key), live)


def keep_base(model: nn.Module, record: AdapterState, key: str) -> None:
    """Let what the model holds be the base's own, unless it has its own already."""
    held = held_at(model, key)
    if key not in record.base and _may_be_exchanged(held):
        record.base[key] = record.first[key] = held
    elif key not in record.base:
        record.base[key] = own_copy(stored_at(model, key), held)


def whole_tensors(model: nn.Module, record: AdapterState, name: str) -> dict[str, Tensor]:
    """What belongs to an adapter besides its updates, with the values of now: what is saved with it."""
    adopt(model, record)
    return dict(record.adapters[name].modules_to_save)


def trained_whole(model: nn.Module, record: AdapterState) -> list[nn.Parameter]:
    """Those of the whole tensors in the model that train."""
    adopt(model, record)
    own = own_parameters(model)
    return [parameter for key, parameter in own.items() if parameter.requires_grad and (record.frozen or key in record.base)]


def load_tensors(model: nn.Module, record: AdapterState) -> None:
    """Put the supplying adapter's whole tensors into the model, and the base's own where it has none."""
    supplied = record.adapters[record.supplier].modules_to_save if record.supplier else {}
    for key, own in record.base.items():
        owner = supplied if key in supplied else record.base
        owner[key] = put(model, key, supplied.get(key, own))


@torch.no_grad()
def put(model: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """Let the model hold this tensor, wherever it held the one before, and return the object that has the values now."""
    held = held_at(model, key)
    if held is tensor:
        return tensor
    if not isinstance(tensor, nn.Parameter) and isinstance(held, nn.Parameter):
        tensor = own_copy(tensor, held)
    if not _may_be_exchanged(held):
        if held.shape == tensor.shape:
            stored_at(model, key).copy_(tensor)
        else:
            module, name = split_path(model, key)
            exchange(module, name, nn.Parameter(tensor.detach().clone(), requires_grad=held.requires_grad))
        return tensor
    if (tensor.device, tensor.dtype) != (held.device, held.dtype):  # the model was moved or cast meanwhile
        tensor.data = tensor.data.to(held.device, held.dtype)
    if isinstance(tensor, nn.Parameter):
        tensor.requires_grad_(held.requires_grad)
    for slots, module, name in _slots(model, held):
        slots[name] = tensor
        if isinstance(module, nn.Linear) and name == "weight":
            module.out_features, module.in_features = tensor.shape
    return tensor


def kept_elsewhere(model: nn.Module, record: AdapterState) -> list[Tensor]:
    """The values of whole tensors that are offloaded or sharded: a switch writes into these."""
    held = own_tensors(model) if record.base else {}  # of an exchanged head nothing may be left
    return [stored_at(model, key) for key in record.base if key in held and not _may_be_exchanged(held[key])]


def restore_first(model: nn.Module, record: AdapterState) -> None:
    """Let the model hold the very objects it had before the first adapter, with the values it has now."""
    for key, first in record.first.items():
        live = held_at(model, key) if key in record.base else first
        if (
            live is not first
            and _may_be_exchanged(live)
            and (live.shape, live.dtype, live.device) == (first.shape, first.dtype, first.device)
        ):
            with torch.no_grad():
                first.copy_(live)
            put(model, key, first)


def _forget(record: AdapterState, key: str) -> None:
    for values in (record.base, record.first, *(adapter.modules_to_save for adapter in record.adapters.values())):
        values.pop(key, None)


def _may_be_exchanged(held: Tensor) -> bool:
    """Not the placeholder of an offloaded tensor, nor a shard: the values of these are kept elsewhere."""
    return type(held) in (nn.Parameter, Tensor) and held.device.type != "meta"


def _slots(model: nn.Module, held: Tensor) -> Iterator[tuple[dict[str, Any], nn.Module, str]]:
    """Every place in the model that holds this object: tied parameters have several."""
    for module in modules_of(model):
        for slots in (module._parameters, module._buffers):
            for name, tensor in list(slots.items()):
                if tensor is held:
                    yield slots, module, name
