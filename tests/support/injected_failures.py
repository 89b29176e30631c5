"""Failures injected into every function of the library that a call runs through, one at a time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

import loca_vision
from loca_vision import active_adapters
from loca_vision.model.traversal import unwrap

LIBRARY = str(Path(loca_vision.__file__).parent)


class Injected(RuntimeError):
    """Raised as if by the library."""


@cache
def _name_of(code: CodeType) -> str | None:
    """File and line of a function of the library; every function that Python calls asks, most of them of other libraries."""
    if not code.co_filename.startswith(LIBRARY) or code.co_name.startswith("<"):
        return None
    return f"{code.co_filename[len(LIBRARY) + 1 :]}:{code.co_firstlineno}:{code.co_name}"


@contextmanager
def watching(on_call: Callable[[str], None]) -> Iterator[None]:
    """Inside, `on_call` hears of every call of a function of the library, by file and line; what it raises is raised there."""

    def trace(frame: FrameType, event: str, argument: Any, name_of: Callable[[CodeType], str | None] = _name_of) -> None:
        if (name := name_of(frame.f_code)) is not None:
            on_call(name)

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def functions_called(act: Callable[[], Any]) -> Counter[str]:
    """Every function of the library that runs, in the order of its first call, and how often."""
    seen: Counter[str] = Counter()
    with watching(lambda name: seen.update([name])):
        act()
    return seen


def fail_in(function: str, act: Callable[[], Any], *, call: int = 1) -> bool:
    """Run `act` with a failure in the n-th call of a function; whether there was such a call."""
    count = 0

    def raise_there(name: str) -> None:
        nonlocal count
        count += name == function
        if name == function and count == call:
            sys.settrace(None)
            raise Injected(function)

    try:
        with watching(raise_there):
            act()
    except BaseException:  # the library may put another sentence in its place
        return count >= call
    assert count < call, f"{function}: the failure was swallowed"
    return False


@torch.no_grad()
def everything(model: nn.Module, output: Callable[[], Tensor]) -> dict[str, Any]:
    """All there is to tell about a model."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())  # it is asked thousands of times
    return {
        "output": output(),
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "objects": {key: id(value) for key, value in parameters.items()},
        "classes": {path: type(module) for path, module in modules.items()},
        "children": list(modules),
        "hooks": {path: _hooks(module) for path, module in modules.items()},
        "attributes": {path: sorted(vars(module)) for path, module in modules.items()},
        "sizes": {path: (m.out_features, m.in_features) for path, m in modules.items() if isinstance(m, nn.Linear)},
        "learns": {key: parameter.requires_grad for key, parameter in parameters.items()},
        "gradients": {key: None if p.grad is None else p.grad.clone() for key, p in parameters.items()},
        "active": active_adapters(model),
        "config": dict(getattr(unwrap(model), "config", None) or {}) if hasattr(model, "register_to_config") else {},
    }


def assert_same(after: dict[str, Any], before: dict[str, Any], where: str) -> None:
    for fact, value in before.items():
        assert _equal(after[fact], value), f"after a failure in {where}: {fact}"


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)


def _hooks(module: nn.Module) -> list[int]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_post_hooks")
    return [len(getattr(module, name)) for name in names]
