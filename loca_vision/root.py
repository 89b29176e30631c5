"""What a whole model needs besides its layers: the strength of one call, and a `save_pretrained` that writes the base alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from loca_vision.calls import KEYWORDS, scale_in, scale_of_the_call_above
from loca_vision.conv_in import WEIGHT, conv_in_of_the_base
from loca_vision.record import record_of
from loca_vision.updates import Circumstances, Reading

_CHILD, _HOOK, _SETTINGS = "loca_circumstances", "_loca_call_hook", "_loca_settings"


@dataclass(frozen=True)
class Settings:
    """What was chosen for a model before and beyond any adapter.

    Args:
        max_components: room in every spectrum for the adapters that are to be swapped in.
        low_memory: apply updates to activations instead of building weights for them.
    """

    max_components: int | None = None
    low_memory: bool = False


def settings_of(model: nn.Module) -> Settings:
    found: Settings = model.__dict__.get(_SETTINGS, Settings())
    return found


def choose(model: nn.Module, **settings: Any) -> None:
    """Change some of them; those of a model that is as usual are not kept."""
    model.__dict__[_SETTINGS] = replace(settings_of(model), **settings)
    if settings_of(model) == Settings():
        del model.__dict__[_SETTINGS]


def circumstances(model: nn.Module) -> Circumstances:
    """Those of this model, which has them from now on."""
    found = model._modules.get(_CHILD)
    if not isinstance(found, Circumstances):
        with torch.inference_mode(False):
            found = Circumstances()
        found.low_memory = settings_of(model).low_memory
        model.add_module(_CHILD, found)
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.device.type != "meta":
            found.to(parameter.device)
        hearing = takes_attention_kwargs(model)
        hook = read_strength if hearing else hear_strength
        model.__dict__[_HOOK] = model.register_forward_pre_hook(hook, with_kwargs=hearing)
        if hasattr(model, "save_pretrained"):
            model.__dict__["save_pretrained"] = SaveBase(model)
    return found


def forget_circumstances(model: nn.Module) -> None:
    """Undo what `circumstances` did."""
    model._modules.pop(_CHILD, None)
    hook = model.__dict__.pop(_HOOK, None)
    if hook is not None:
        hook.remove()
    if isinstance(model.__dict__.get("save_pretrained"), SaveBase):
        del model.__dict__["save_pretrained"]


def set_low_memory(model: nn.Module, enabled: bool) -> None:
    """Whether the model's updates are applied to activations; what was built for them is dropped."""
    choose(model, low_memory=enabled)
    found = model._modules.get(_CHILD)
    if isinstance(found, Circumstances):
        found.low_memory = enabled
        for module in model.modules():
            if isinstance(module, Reading):
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
    model._modules[_CHILD].set_strength(strength)  # type: ignore[union-attr, operator]
    return inputs, named


@_disable_dynamo  # torch.compiler.disable, which would import the compiler here and now
def hear_strength(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """The same for a model whose `forward` takes no such argument."""
    model._modules[_CHILD].set_strength(scale_of_the_call_above())  # type: ignore[union-attr, operator]


class SaveBase:
    """`save_pretrained` of a model with adapters: the file has the keys of the base, and the stock class loads it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._stock())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hook = self.model._register_state_dict_hook(without_adapters)  # type: ignore[no-untyped-call]
        try:
            with conv_in_of_the_base(self.model):
                return self._stock()(*args, **kwargs)
        finally:
            hook.remove()

    def _stock(self) -> Any:
        cls: Any = type(self.model)
        return cls.save_pretrained.__get__(self.model)


def without_adapters(model: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
    """Also without an adapter's whole tensors, unless its updates are in the weights too."""
    for key in [key for key in state if ".loca." in f".{key}"]:
        del state[key]
    record = record_of(model)
    if record is not None and not record.supplier_is_fused:
        narrow = {} if record.narrow is None else {WEIGHT: record.narrow.detach()}
        state.update({key: value for key, value in (record.base | narrow).items() if key in state})
