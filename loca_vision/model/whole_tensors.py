"""Tensors that an adapter trains as a whole, such as a classifier head.

Every adapter has its own objects for these tensors, and so does the base; the model holds those of one supplier at a time.
A switch replaces objects and never writes into them, so that a graph recorded before it keeps the values it was recorded with.
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
    """Return a copy of the values: if `like` is a parameter, one with the same `requires_grad`, otherwise a plain tensor."""
    with ordinary_tensors():
        values = tensor.detach().clone().to(like.dtype)
        return nn.Parameter(values, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else values


def held_at(model: nn.Module, key: str) -> Tensor:
    """Return the object that the model holds, which is a placeholder if the layer is offloaded."""
    module, name = split_path(model, key)
    held = module._parameters.get(name)
    return module._buffers[name] if held is None else held  # type: ignore[return-value]


def adopt(model: nn.Module, record: AdapterState) -> None:
    """Update the record from the model, in which a user, a trainer or an offloader may have replaced tensors.

    A tensor in the model belongs to the adapter that supplies it, or else to the base. Tensors that have become trainable since
    the last adapter was added, including those of a new head, belong to the last active adapter from now on.
    """
    if not record.base and not record.frozen:  # looking at every parameter takes milliseconds
        return
    tensors = own_tensors(model)
    supplied = record.adapters[record.supplier].modules_to_save if record.supplier else {}
    for key in [key for key in record.base if key not in tensors]:
        _forget(record, key)
    for key in list(record.base):
        owner = supplied if key in supplied else record.base
        if tensors[key].shape != owner[key].shape:  # the module was replaced: the previous values are useless
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
    """Assign the tensor in the model to an adapter; the base gets a copy if it has none.

    If the base already has its own, the adapter gets a copy instead.
    """
    if key not in record.base:
        record.base[key] = own_copy(stored_at(model, key), live)
        if _may_be_exchanged(live):
            record.first[key] = live
        record.adapters[name].modules_to_save[key] = live
    else:
        record.adapters[name].modules_to_save[key] = own_copy(stored_at(model, key), live)


def keep_base(model: nn.Module, record: AdapterState, key: str) -> None:
    """Assign the tensor in the model to the base, unless the base already has its own."""
    held = held_at(model, key)
    if key not in record.base and _may_be_exchanged(held):
        record.base[key] = record.first[key] = held
    elif key not in record.base:
        record.base[key] = own_copy(stored_at(model, key), held)


def whole_tensors(model: nn.Module, record: AdapterState, name: str) -> dict[str, Tensor]:
    """Return the tensors that an adapter trains as a whole, with their current values; they are saved with it."""
    adopt(model, record)
    return dict(record.adapters[name].modules_to_save)


def trained_whole(model: nn.Module, record: AdapterState) -> list[nn.Parameter]:
    """Return the trainable parameters among the model's own that belong to adapters."""
    adopt(model, record)
    own = own_parameters(model)
    return [parameter for key, parameter in own.items() if parameter.requires_grad and (record.frozen or key in record.base)]


def load_tensors(model: nn.Module, record: AdapterState) -> None:
    """Put the supplying adapter's whole tensors into the model, and the base's own for those that it does not have."""
    supplied = record.adapters[record.supplier].modules_to_save if record.supplier else {}
    for key, own in record.base.items():
        owner = supplied if key in supplied else record.base
        owner[key] = put(model, key, supplied.get(key, own))


@torch.no_grad()
def put(model: nn.Module, key: str, tensor: Tensor) -> Tensor:
    """Replace a tensor of the model everywhere the model holds it, and return the object that has the new values."""
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
    if (tensor.device, tensor.dtype) != (held.device, held.dtype):  # the model has been moved or cast in the meantime
        tensor.data = tensor.data.to(held.device, held.dtype)
    if isinstance(tensor, nn.Parameter):
        tensor.requires_grad_(held.requires_grad)
    for slots, module, name in _slots(model, held):
        slots[name] = tensor
        if isinstance(module, nn.Linear) and name == "weight":
            module.out_features, module.in_features = tensor.shape
    return tensor


def kept_elsewhere(model: nn.Module, record: AdapterState) -> list[Tensor]:
    """Return the values of whole tensors that are offloaded or sharded; switching adapters writes into these."""
    held = own_tensors(model) if record.base else {}  # tensors of a replaced head may be gone
    return [stored_at(model, key) for key in record.base if key in held and not _may_be_exchanged(held[key])]


def restore_first(model: nn.Module, record: AdapterState) -> None:
    """Put the objects that the model held before the first adapter back into it, with the model's current values."""
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
    """Whether the object can be replaced: not an offloaded tensor's placeholder or a shard, whose values are elsewhere."""
    return type(held) in (nn.Parameter, Tensor) and held.device.type != "meta"


def _slots(model: nn.Module, held: Tensor) -> Iterator[tuple[dict[str, Any], nn.Module, str]]:
    """Yield every place in the model that holds this object; tied parameters have several."""
    for module in modules_of(model):
        for slots in (module._parameters, module._buffers):
            for name, tensor in list(slots.items()):
                if tensor is held:
                    yield slots, module, name
