"""Hooks by which calls that mix adapters hear of the calls of a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

from torch import nn

from loca_vision.layers.mixtures import forget_last_call, handle_of, owner_of
from loca_vision.model.traversal import modules_of

_LOCK = Lock()  # two threads must not give a module two hooks


class Watch:
    """A hook that knows whom it watches for, by handle; one in a copy does nothing, until the copy is watched."""

    def __init__(self) -> None:
        self.handle = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


def watch(module: nn.Module, kind: type[Watch], there: Mapping[int, Any], register: Callable[..., Any]) -> int:
    """Let a hook of this kind watch for the module, unless one does; returns the module's handle.

    Args:
        there: the hooks that there are where it belongs.
        register: puts a new one there.
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
    """Take these hooks out of a model, and let go of what they kept."""
    with _LOCK:
        for module in modules_of(model):
            forget_last_call(module)
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if isinstance(hook, Watch)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
