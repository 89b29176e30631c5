"""Module names that differ between versions of transformers, in files and in models.

Since transformers 5, a CLIP text encoder no longer has the `text_model` that contained its modules, nor a vision encoder its
`vision_model`. Files keep the prefix, as those of diffusers and kohya do; adapters load into models of either version.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import TypeVar

from torch import nn

from loca_vision.formats.adapter_file import Description

_Value = TypeVar("_Value")
Rename = Callable[[str], str]
_LOST = {"CLIPTextModel": "text_model.", "CLIPVisionModel": "vision_model."}


def as_in_files(model: nn.Module) -> Rename:
    """Return the function that turns names in a model into names in its files."""
    prefix = _lost_prefix(model)
    return _same if prefix is None else lambda name: f"{prefix}{name}"


def as_in_model(model: nn.Module, about: Description) -> Rename:
    """Return the function that turns names in a file into names in a model."""
    names = [*about.shapes, *about.whole]
    prefix = _lost_prefix(model)
    if prefix is not None and any(name.startswith(prefix) for name in names):
        return lambda name: name.removeprefix(prefix)
    kept = next((known for known in _LOST.values() if known.rstrip(".") in model._modules), None)
    if kept is not None and not any(name.startswith(kept) for name in names) and names[0].startswith("encoder."):
        return lambda name: name if name.split(".")[0] in model._modules else f"{kept}{name}"
    return _same


def _same(name: str) -> str:
    return name


def _lost_prefix(model: nn.Module) -> str | None:
    """Return the prefix that the names of the model's modules lack, or None."""
    for cls in type(model).__mro__:
        prefix = _LOST.get(cls.__name__) if cls.__module__.startswith("transformers.") else None
        if prefix is not None:
            return None if prefix.rstrip(".") in model._modules else prefix
    return None


def renamed(about: Description, rename: Rename) -> Description:
    """Return the description of a single model with its projections and parameters renamed."""
    return replace(
        about,
        configs={"": about.configs[""].renamed(rename)},
        shapes={rename(name): shape for name, shape in about.shapes.items()},
        whole=tuple(rename(name) for name in about.whole),
        convolutions=frozenset(rename(name) for name in about.convolutions),
    )


def renamed_keys(tensors: Mapping[str, _Value], about: Description, rename: Rename) -> dict[str, _Value]:
    """Rename the tensors, or entries, of a file in the same way; `about` has the old names.

    Keys that belong to no projection, such as cells that several projections share, are kept.
    """
    if rename is _same:
        return dict(tensors)
    return {_renamed_key(key, about.shapes, rename): value for key, value in tensors.items()}


def _renamed_key(key: str, projections: Container[str], rename: Rename) -> str:
    if key.startswith("full."):
        return f"full.{rename(key[5:])}"
    parts = key.split(".")
    for end in range(len(parts) - 1, 0, -1):
        projection = ".".join(parts[:end])
        if projection in projections:
            return ".".join([rename(projection), *parts[end:]])
    return key
