"""Pipeline classes whose calls pass their scale to every component, including text encoders.

A pipeline passes `cross_attention_kwargs={"scale": s}` only to its UNet or transformer, and a text encoder has no reference to
the pipelines it is in. So `__call__` and `encode_prompt` are wrapped to set a context variable that adapted models read.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

from loca_vision.checks import as_number
from loca_vision.layers.pipeline_call import PipelineCall, current_call, other_calls_of, under_way
from loca_vision.model.call_scale import KEYWORDS, scale_in
from loca_vision.pipeline.class_wrapping import Method, wrap_methods
from loca_vision.pipeline.components import adapted_in
from loca_vision.pipeline.per_prompt import KEYWORD, per_prompt

ENTRIES = ("__call__", "encode_prompt")


def tell_scale(cls: type, *, alone: bool = False) -> None:
    """Wrap the entries of a pipeline class; with `alone`, independently of its bases."""
    wrap_methods(cls, ENTRIES, _telling, alone=alone)


def _telling(entry: Method) -> Method:
    """Wrap `entry` so that it runs as part of a call that has a scale."""
    signature = inspect.signature(entry)

    @wraps(entry)
    def telling(self: Any, *inputs: Any, **named: Any) -> Any:
        named |= {name: _plain(named[name]) for name in KEYWORDS if name in named}
        mixed = named.pop(KEYWORD, None)
        try:
            arguments = signature.bind_partial(self, *inputs, **named).arguments
        except TypeError:
            return entry(self, *inputs, **named)  # raises the proper error
        nested = inspect.getattr_static(type(self), "__call__", None) is not telling  # `super().__call__`, or `encode_prompt`
        flat = _flat(arguments)
        with under_way(_call_of(self, flat, nested=nested)):
            if mixed is None:
                return entry(self, *inputs, **named)
            with per_prompt(self, mixed, flat, signature):
                return entry(self, *inputs, **named)

    inner = getattr(entry, "__wrapped__", None)
    if inner is not None:  # `__wrapped__` lets callers bypass `torch.no_grad` to get gradients; that path needs the scale too
        telling.__wrapped__ = _telling(inner)
    return telling


def _call_of(pipe: Any, arguments: Mapping[str, Any], *, nested: bool) -> PipelineCall:
    """Return the call that begins with these arguments, or the enclosing call that it is part of.

    Raises:
        ValueError: its scale is not a finite number, and the pipeline has adapters.
    """
    around = current_call()
    mappings = [value for value in map(arguments.get, KEYWORDS) if isinstance(value, Mapping)]
    here = frozenset(map(id, mappings))
    scale = _scale_given(pipe, mappings, arguments.get("lora_scale"))
    if nested and around is not None and around.pipe == id(pipe) and (scale is None or _is_mixed_up(around, scale)):
        return replace(around, mappings=around.mappings | here)
    return PipelineCall(id(pipe), 1.0 if scale is None else scale, here)


def _scale_given(pipe: Any, mappings: list[Mapping[str, Any]], lora_scale: Any) -> float | None:
    named = [] if lora_scale is None else [{"scale": lora_scale}]
    try:
        return next((scale for scale in map(scale_in, [*named, *mappings]) if scale is not None), None)
    except ValueError:
        if adapted_in(pipe):
            raise
        return None  # left to diffusers


def _is_mixed_up(call: PipelineCall, scale: float) -> bool:
    """Return whether this scale is from another thread's call of the same pipeline, on which diffusers stores it."""
    return scale != call.scale and any(scale == other.scale for other in other_calls_of(call.pipe))


def _plain(settings: Any) -> Any:
    """Return the settings with the scale as an ordinary number, which compiled code needs."""
    if not isinstance(settings, Mapping) or type(settings.get("scale")) in (int, float, type(None)):
        return settings
    number = as_number(settings["scale"])
    return settings if number is None else {**settings, "scale": number}


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments together with those in `**kwargs` and in the state of a modular pipeline."""
    state = getattr(arguments.get("state"), "values", None)
    more = arguments.get("kwargs")
    return {**(state if isinstance(state, Mapping) else {}), **(more if isinstance(more, Mapping) else {}), **arguments}
