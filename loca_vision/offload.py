"""Find the values of tensors that accelerate has offloaded; their modules only hold placeholders on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def stored(module: nn.Module, name: str) -> Tensor:
    """Return the tensor `name` of exactly this module, wherever its values are stored; in-place writes reach that place.

    For a model that was created on the meta device and has no values at all, return the placeholder.
    """
    held = module._parameters.get(name)
    tensor: Any = held if held is not None else module._buffers.get(name)
    kept = None if tensor is None or tensor.device.type != "meta" else _kept(module, name)
    return tensor if kept is None else kept[name]  # type: ignore[no-any-return]


def exchange(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Replace the parameter `name` with another one of any shape, storing its values where those of the old one were stored."""
    old: Any = module._parameters[name]
    kept: Any = _kept(module, name) if old.device.type == "meta" else None
    if kept is None:
        module._parameters[name] = parameter
        return
    module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
    prefix = getattr(kept, "prefix", "")  # `kept` is accelerate's view of all tensors of the model, some maybe on a disk
    every = getattr(kept, "dataset", kept)
    getattr(every, "state_dict", every)[f"{prefix}{name}"] = parameter.detach()


def copied_elsewhere(model: nn.Module, module: nn.Module) -> bool:
    """Whether diffusers' group offloading uses its own copies of this module's tensors, on a disk or for a stream."""
    registries = (getattr(inner, "_diffusers_hook", None) for inner in model.modules())
    hooks = (hook for registry in registries for hook in getattr(registry, "hooks", {}).values())
    groups = (group for group in (getattr(hook, "group", None) for hook in hooks) if group is not None)
    return any(
        any(module is one for one in group.modules) and (group.stream is not None or group.offload_to_disk_path is not None)
        for group in groups
    )


def _kept(module: nn.Module, name: str) -> Any:
    """Return accelerate's mapping that has the values of a tensor on the meta device, or None if there is none."""
    hook: Any = getattr(module, "_hf_hook", None)
    maps = (getattr(candidate, "weights_map", None) for candidate in getattr(hook, "hooks", (hook,)))
    return next((kept for kept in maps if kept is not None and kept[name].device.type != "meta"), None)


def stored_at(model: nn.Module, path: str) -> Tensor:
    """Return the same as `stored`, for the tensor's path in a model."""
    return stored(*split_path(model, path))


def split_path(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """Return the module that has a tensor, and the tensor's name there; the path leaves out wrappers such as `_orig_mod`."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    while (
        name not in module._parameters
        and name not in module._buffers
        and isinstance(inner := getattr(module, "_orig_mod", None), nn.Module)
    ):
        module = inner
    return module, name


def device_for(module: nn.Module, name: str = "weight") -> torch.device:
    """Return the device for what belongs to the tensor `name` of this module: its own, or where it is used if offloaded.

    Without either, this is the CPU.
    """
    tensor: Any = module._parameters.get(name)
    if isinstance(tensor, Tensor) and tensor.device.type != "meta":
        return tensor.device
    device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if device is None:
        return torch.device("cpu")
    return torch.device(f"cuda:{device}") if isinstance(device, int) else torch.device(device)
