"""An optimiser as tensors and JSON, for a checkpoint from which it continues bit for bit. No pickle.

The tensors' names begin with "optimizer.", so that they can be in one checkpoint with others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

_PREFIX = "optimizer."


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the `state_dict` of any torch optimiser, flattened: tensors, and everything else as JSON.

    Args:
        optimizer: the optimiser, or one that accelerate has prepared. A parameter without state stays without.

    Raises:
        TypeError: its state holds something other than tensors, numbers, texts, None, and lists, tuples and tables of these.
    """
    inner = _inner(optimizer)
    saved = inner.state_dict()
    tensors: dict[str, Tensor] = {}
    state = {
        "kind": type(inner).__name__,
        "shapes": _shapes(inner),
        "groups": [_flat(group, f"{_PREFIX}group.{i}", tensors) for i, group in enumerate(saved["param_groups"])],
        "state": {str(key): _flat(value, f"{_PREFIX}{key}", tensors) for key, value in saved["state"].items()},
    }
    return tensors, state


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Restore an optimiser over the same parameters to the saved state, bit for bit, including rates and other settings.

    Args:
        optimizer: the optimiser, or one that accelerate has prepared.
        tensors: those of `optimizer_tensors`; others, whose names do not begin with "optimizer.", may be among them.
        state: the state of `optimizer_tensors`.

    Raises:
        ValueError: the kind of optimiser, the number of groups or parameters, a shape or a dtype differs, or something is
            missing or left over; the optimiser is unchanged.
    """
    inner = _inner(optimizer)
    try:
        saved = _unflattened(state, tensors)
        _check_same(inner, state, saved)
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"optimizer: this is not the state of one ({error})") from error
    for group, here in zip(saved["param_groups"], inner.param_groups, strict=True):
        group.update(
            {k: v.to(here[k].device) for k, v in group.items() if isinstance(v, Tensor) and isinstance(here.get(k), Tensor)}
        )
    inner.load_state_dict(saved)
    places = [key for group in saved["param_groups"] for key in group["params"]]
    parameters = [parameter for group in inner.param_groups for parameter in group["params"]]
    for key, parameter in zip(places, parameters, strict=True):
        if key in saved["state"]:
            inner.state[parameter] = _exact(inner.state[parameter], saved["state"][key])


def _inner(optimizer: Optimizer) -> Optimizer:
    """Return the optimiser that accelerate has wrapped."""
    while isinstance(wrapped := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = wrapped
    return optimizer


def _shapes(optimizer: Optimizer) -> list[list[str]]:
    """Return dtype and shape of each group's parameters, as in "float32 3x4"."""
    return [
        [f"{str(p.dtype).removeprefix('torch.')} {'x'.join(map(str, p.shape))}" for p in group["params"]]
        for group in optimizer.param_groups
    ]


def _flat(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON. What JSON lacks becomes a table with one key that names its kind; tensors go into `tensors`."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) in (list, tuple):
        items = [_flat(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        return {"table": [[key, _flat(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    raise TypeError(f"{name}: a {type(value).__name__} in an optimiser's state cannot be in a checkpoint")


def _whole(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Invert `_flat`; tensors are taken out of `tensors`."""
    if isinstance(value, list):
        return [_whole(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors.pop(content).clone()  # cloned because an optimiser works in place
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_whole(content, tensors))
    if kind == "table":
        return {key: _whole(item, tensors) for key, item in content}
    raise TypeError(f"{kind!r} is not a kind of value")


def _unflattened(state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the `state_dict`, using each of its tensors once."""
    left = {name: tensor for name, tensor in tensors.items() if name.startswith(_PREFIX)}
    try:
        groups = [_whole(group, left) for group in state["groups"]]
        states = {int(key): _whole(value, left) for key, value in state["state"].items()}
    except KeyError as error:
        raise ValueError(f"optimizer: {error} is missing from the checkpoint, or there twice") from None
    if left:
        raise ValueError(f"optimizer: nothing refers to the tensor {min(left)!r} of the checkpoint")
    return {"param_groups": groups, "state": states}


def _check_same(optimizer: Optimizer, state: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    mine, theirs = _shapes(optimizer), state["shapes"]
    if state["kind"] != type(optimizer).__name__:
        raise ValueError(f"optimizer: the checkpoint has {state['kind']}, here it is {type(optimizer).__name__}")
    if not len(saved["param_groups"]) == len(theirs) == len(mine):
        raise ValueError(f"optimizer: {len(theirs)} groups of parameters in the checkpoint, {len(mine)} here")
    for i, (group, here) in enumerate(zip(saved["param_groups"], optimizer.param_groups, strict=True)):
        if not len(group["params"]) == len(theirs[i]) == len(mine[i]):
            raise ValueError(f"optimizer: group {i} has {len(theirs[i])} parameters in the checkpoint, {len(mine[i])} here")
        if group.get("name") != here.get("name"):
            raise ValueError(f"optimizer: group {i} is {group.get('name')!r} in the checkpoint, {here.get('name')!r} here")
        for j, (there, shape) in enumerate(zip(theirs[i], mine[i], strict=True)):
            if there != shape:
                raise ValueError(f"optimizer: parameter {j} of group {i} is {there} in the checkpoint, {shape} here")
    known = [key for group in saved["param_groups"] for key in group["params"]]
    if sorted(known) != list(range(len(known))) or not set(saved["state"]) <= set(known):
        raise ValueError("optimizer: the checkpoint numbers its parameters in no order of torch's")
    if not all(isinstance(value, dict) for value in saved["state"].values()):
        raise ValueError("optimizer: the state of a parameter is not a table")


def _exact(loaded: Any, saved: Any) -> Any:
    """Return the saved value on the device that torch moved it to, since torch also casts tensors and spoils texts."""
    if isinstance(saved, Tensor):
        return saved.to(loaded.device) if isinstance(loaded, Tensor) else saved
    if isinstance(saved, dict) and isinstance(loaded, dict):
        return loaded | {key: _exact(loaded.get(key), value) for key, value in saved.items()}
    if isinstance(saved, (list, tuple)) and isinstance(loaded, (list, tuple)):
        return type(saved)(_exact(*pair) for pair in zip(loaded, saved, strict=True))
    return loaded if isinstance(loaded, Tensor) else saved  # newer versions turn a count into a tensor
