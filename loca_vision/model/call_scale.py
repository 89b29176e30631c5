"""The scale of one call: `cross_attention_kwargs={"scale": s}`, seen by every component of the pipeline."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from loca_vision.layers.call_settings import CallSettings
from loca_vision.layers.effective_weight import EffectiveWeight
from loca_vision.model.options import choose, settings_of

_CHILD = "loca_call_settings"

_HOOK = "_loca_call_hook"


def call_settings(model: nn.Module) -> CallSettings:
    """Those of this model, which has them from now on."""
    found = model._modules.get(_CHILD)
    if not isinstance(found, CallSettings):
        with torch.inference_mode(False):
            found = CallSettings()
        found.low_memory = settings_of(model).low_memory
        model.add_module(_CHILD, found)
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device.type != "meta":
            found.to(parameter.device)
        hearing = takes_attention_kwargs(model)
        hook = read_strength if hearing else hear_strength
        model.__dict__[_HOOK] = model.register_forward_pre_hook(hook, with_kwargs=hearing)
    return found


def forget_call_settings(model: nn.Module) -> None:
    """Undo what `call_settings` did."""
    model._modules.pop(_CHILD, None)
    hook = model.__dict__.pop(_HOOK, None)
    if hook is not None:
        hook.remove()


def set_low_memory(model: nn.Module, enabled: bool) -> None:
    """Whether the model's updates are applied to activations; what was built for them is dropped."""
    choose(model, low_memory=enabled)
    found = model._modules.get(_CHILD)
    if isinstance(found, CallSettings):
        found.low_memory = enabled
        for module in model.modules():
            if isinstance(module, EffectiveWeight):
                module.drop()


def takes_attention_kwargs(model: nn.Module) -> bool:
    """Whether a call of the model can say how strongly its adapters act."""
    return any(name in inspect.signature(type(model).forward).parameters for name in KEYWORDS)


def read_strength(model: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A forward pre-hook: `cross_attention_kwargs={"scale": s}` is how strongly all adapters act in this call.

    It stands until the next call, since a checkpointed block runs again in the backward pass. The scale goes on to diffusers
    only where peft has layers for it: without any, diffusers would warn that it has no effect.
    """
    strength = None
    for name in KEYWORDS:
        settings = named.get(name)
        if settings is not None and "scale" in settings:
            strength = scale_in(settings)
            if not hasattr(model, "peft_config"):
                named = named | {name: {key: value for key, value in settings.items() if key != "scale"} or None}
    if strength is None:
        strength = 1.0 if torch.compiler.is_compiling() else scale_of_the_call_above()
    model._modules[_CHILD].set_scale(strength)  # type: ignore[union-attr, operator]
    return inputs, named


@_disable_dynamo  # torch.compiler.disable, which would import the compiler here and now
def hear_strength(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """The same for a model whose `forward` takes no such argument."""
    model._modules[_CHILD].set_scale(scale_of_the_call_above())  # type: ignore[union-attr, operator]


KEYWORDS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def scale_in(settings: Any) -> Any:
    """The `scale` of keyword arguments for attention, None where they have none.

    Raises:
        ValueError: it is no finite number.
    """
    if not isinstance(settings, Mapping) or "scale" not in settings:
        return None
    scale = settings["scale"]
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale - scale != 0:
        raise ValueError(f"scale={scale!r}: the scale of a call is a finite number")
    return scale


def scale_of_the_call_above() -> float:
    """What the nearest pipeline call on the stack was given, 1.0 where there is none.

    A pipeline passes the number on to its UNet or transformer alone, and nothing leads from a text encoder to the pipelines
    it is in: the arguments of the call that is under way are the one place where it stands.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("__call__", "encode_prompt"):
            given = frame.f_locals
            if hasattr(given.get("self"), "components"):
                named = [{"scale": given["lora_scale"]}] if given.get("lora_scale") is not None else []
                scales = [scale_in(settings) for settings in (*named, *map(given.get, KEYWORDS))]
                found = next((scale for scale in scales if scale is not None), None)
                if found is not None or frame.f_code.co_name == "__call__":
                    return 1.0 if found is None else float(found)
        frame = frame.f_back
    return 1.0
