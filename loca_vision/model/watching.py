"""Hooks that inform calls that mix adapters about the calls of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

from torch import nn

from loca_vision.layers.mixtures import forget_last_call, handle_of, owner_of
from loca_vision.model.traversal import modules_of

_LOCK = Lock()  # so that two threads cannot give a module two hooks


class Watch:
    """A hook that knows the handle of the module it watches for; a hook in a copy does nothing until the copy is watched."""

    def __init__(self) -> None:
        self.handle = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def watch(module: nn.Module, kind: type[Watch], there: Mapping[int, Any], register: Callable[..., Any]) -> int:
    """Let a hook of this kind watch for the module, unless one already does, and return the module's handle.

    Args:
        module: the module to watch for.
        kind: the class of the hook.
        there: the existing hooks in the place where the hook belongs.
        register: registers a new hook there.
    """
    handle = handle_of(module)
    with _LOCK:
        hooks = [hook for hook in there.values() if type(hook) is kind]
        if not any(hook.handle == handle for hook in hooks):
            hook = next((hook for hook in hooks if owner_of(hook.handle) is None), None)
            if hook is None:
                hook = kind()
                register(hook)
            hook.handle = handle
    return handle


def unwatch(model: nn.Module) -> None:
    """Remove these hooks from a model, and release what they kept."""
    with _LOCK:
        for module in modules_of(model):
            forget_last_call(module)
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, Watch)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
