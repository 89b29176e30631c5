"""Where a tensor really is while accelerate has it offloaded: its module then holds a placeholder on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def stored(module: nn.Module, name: str) -> Tensor:
    """The tensor `name` of this very module, wherever its values are kept; writing into it in place writes to that place.

    Of a model that was made on the meta device, and has no values at all, the placeholder.
    """
    held = module._parameters.get(name)
    tensor: Any = held if held is not None else module._buffers.get(name)
    if tensor is None or tensor.device.type != "meta":
        return tensor  # type: ignore[no-any-return]
    hook: Any = getattr(module, "_hf_hook", None)
    for candidate in getattr(hook, "hooks", (hook,)):
        kept = getattr(candidate, "weights_map", None)
        if kept is not None:
            found: Tensor = kept[name]
            if found.device.type != "meta":
                return found
    return tensor  # type: ignore[no-any-return]


def stored_at(model: nn.Module, path: str) -> Tensor:
    """`stored`, by the tensor's path in a model."""
    owner, _, name = path.rpartition(".")
    return stored(model.get_submodule(owner), name)


def device_for(module: nn.Module, name: str = "weight") -> torch.device:
    """Where what belongs to the tensor `name` of this module should be: on its device, or where it goes to be computed with."""
    tensor: Any = module._parameters.get(name)
    if isinstance(tensor, Tensor) and tensor.device.type != "meta":
        return tensor.device
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        return torch.device("cpu")
    return torch.device(f"cuda:{device}") if isinstance(device, int) else torch.device(device)
