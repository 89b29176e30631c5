"""The strength of a pipeline call, for components that the pipeline does not tell of it: text encoders, ControlNets."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

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
