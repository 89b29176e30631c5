"""Every model of diffusers, as small as its class allows: what there is, how it is built, and what a call of it takes.

The sizes follow those of diffusers' own tests (Apache-2.0).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from support.diffusers_zoo import (
    audio_transformers,
    autoencoders,
    beside_denoisers,
    controlnets,
    image_transformers,
    more_autoencoders,
    more_image_transformers,
    more_video_transformers,
    unets,
    video_transformers,
)
from support.diffusers_zoo.left_out import LEFT_OUT

VERSION = "0.42"
ROOMS = (
    image_transformers,
    more_image_transformers,
    video_transformers,
    more_video_transformers,
    audio_transformers,
    unets,
    controlnets,
    autoencoders,
    more_autoencoders,
    beside_denoisers,
)
CASES = {name: case for room in ROOMS for name, case in room.CASES.items()}
__all__ = ["CASES", "LEFT_OUT", "ROOMS", "VERSION", "answer", "class_of", "exported", "model"]


def class_of(name: str) -> Any:
    return getattr(diffusers, name, None) or getattr(diffusers.models, name)


def exported() -> set[str]:
    """The names of all classes of modules that diffusers and diffusers.models offer."""
    names = {*dir(diffusers), *dir(diffusers.models)}
    classes = [_offered(name) for name in names]
    return {cls.__name__ for cls in classes if isinstance(cls, type) and issubclass(cls, nn.Module)}


def _offered(name: str) -> Any:
    if name.endswith(("Pipeline", "Blocks", "Scheduler", "Config")):  # whose imports take a minute
        return None
    try:
        return getattr(diffusers, name, None) or getattr(diffusers.models, name, None)
    except (ImportError, RuntimeError):  # of what needs a package that is not here
        return None


@cache
def model(name: str) -> Any:
    """The model in evaluation mode: who changes it puts it back."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        made = class_of(name)(**CASES[name].config)
        if name == "ZImageControlNetModel":
            made = made.from_transformer(made, model("ZImageTransformer2DModel"))
        _stir(made)
    return made.eval().requires_grad_(False)  # torch computes otherwise with weights that learn


def _stir(made: nn.Module) -> None:
    """Weights that are zero at first, as those of gates and last layers, would hide what is before them."""
    for parameter in made.parameters():
        if parameter.is_floating_point() and parameter.numel() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.05)


@torch.no_grad()
def answer(made: nn.Module, name: str) -> list[Tensor]:
    """The tensors that one call answers with, the same at every call."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(7)
        inputs = CASES[name].inputs()
        torch.manual_seed(8)
        return [tensor for tensor in _tensors(made(**inputs)) if tensor.is_floating_point()]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
