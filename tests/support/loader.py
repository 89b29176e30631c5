"""Targets and a fast way to draw for the tests in pipeline/loader/."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.pipelines import picture

BOTH = {"unet": ("q", "v"), "text_encoder": ("q", "k", "v", "out")}


UNET = {"unet": ("q", "v")}


TEXT = {"text_encoder": ("q", "v")}


CONV_IN = ["unet.conv_in.weight", "unet.conv_in.bias"]


def shown(pipe: Any) -> Tensor:
    """The pipeline's picture, drawn without compiling anything, which would take seconds each time."""
    with torch.compiler.set_stance("force_eager"):
        return picture(pipe)
