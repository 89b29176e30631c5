"""The scale of one call, `cross_attention_kwargs={"scale": s}`, as seen by every component of the pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from loca_vision.checks import finite_number
from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.layers.call_settings import CallSettings
from loca_vision.layers.effective_weight import EffectiveWeight
from loca_vision.layers.pipeline_call import announce_settings, is_from_another_call, scale_of_the_call
from loca_vision.model.options import choose, settings_of

_CHILD = "loca_call_settings"

_HOOK = "_loca_call_hook"


def call_settings(model: nn.Module) -> CallSettings:
    """Return the call settings of the model, adding them if it has none yet."""
    found = model._modules.get(_CHILD)
    if not isinstance(found, CallSettings):
        with ordinary_tensors():
            found = CallSettings()
        found.low_memory = settings_of(model).low_memory
        model.add_module(_CHILD, found)
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device.type != "meta":
            found.to(parameter.device)
        hearing = takes_attention_kwargs(model)
        hook = read_strength if hearing else hear_strength
        model.__dict__[_HOOK] = model.register_forward_pre_hook(hook, with_kwargs=hearing)
        announce_settings()
    return found


def forget_call_settings(model: nn.Module) -> None:
    """Undo what `call_settings` did."""
    model._modules.pop(_CHILD, None)
    hook = model.__dict__.pop(_HOOK, None)
    if hook is not None:
        hook.remove()


def set_low_memory(model: nn.Module, enabled: bool) -> None:
    """Set whether the model's updates are applied to activations, and drop what was built for them."""
    choose(model, low_memory=enabled)
    found = model._modules.get(_CHILD)
    if isinstance(found, CallSettings):
        found.low_memory = enabled
        for module in model.modules():
            if isinstance(module, EffectiveWeight):
                module.drop()


def takes_attention_kwargs(model: nn.Module) -> bool:
    """Whether a call of the model can specify how strongly its adapters act."""
    return any(name in inspect.signature(type(model).forward).parameters for name in KEYWORDS)


def read_strength(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook that makes all adapters act at the scale in `cross_attention_kwargs={"scale": s}` in this call.

    The scale stays set until the next call, because a checkpointed block runs again in the backward pass. It is passed on to
    diffusers only if the model has layers of peft; otherwise diffusers would warn that it has no effect.
    """
    strength = None
    for name in KEYWORDS:
        settings = named.get(name)
        if settings is not None and "scale" in settings:
            strength = scale_in(settings)
            if not torch.compiler.is_compiling() and is_from_another_call(settings):
                strength = None
            if not hasattr(model, "peft_config"):
                named = named | {name: {key: value for key, value in settings.items() if key != "scale"} or None}
    if strength is None:
        strength = 1.0 if torch.compiler.is_compiling() else scale_of_the_call()
    model._modules[_CHILD].set_scale(strength)  # type: ignore[union-attr, operator]
    return inputs, named


@_disable_dynamo  # torch.compiler.disable would import the compiler immediately
def hear_strength(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """A forward pre-hook for a model whose `forward` takes no such argument; it uses the scale of the current pipeline call."""
    model._modules[_CHILD].set_scale(scale_of_the_call())  # type: ignore[union-attr, operator]


KEYWORDS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def scale_in(settings: Any) -> float | None:
    """Return the `scale` in keyword arguments for attention, or None if they have none.

    Raises:
        ValueError: the scale is not a finite number.
    """
    if not isinstance(settings, Mapping) or "scale" not in settings:
        return None
    scale = settings["scale"]
    if not torch.compiler.is_compiling():
        return finite_number(scale, "scale")
    # compiled code treats numbers as symbols: this is the only check of their value that may be made
    if isinstance(scale, (bool, str)) or scale is None or (isinstance(scale, (int, float)) and scale - scale != 0):
        raise ValueError(f"scale={scale!r}: expected a finite number")
    return scale  # type: ignore[no-any-return]
