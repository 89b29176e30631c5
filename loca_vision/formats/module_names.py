"""Names of modules that differ with the version of transformers, in files and in models.

From version 5 on a CLIP text encoder has lost the `text_model` that its modules were in, and a vision encoder its
`vision_model`. Files have it, as those of diffusers and kohya do; adapters load into either.
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
    """What makes the names of a model those of its files."""
    prefix = _lost_prefix(model)
    return _same if prefix is None else lambda name: f"{prefix}{name}"


def as_in_model(model: nn.Module, about: Description) -> Rename:
    """What makes the names of a file those of a model."""
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
    """What is missing before the names of the model's modules."""
    for cls in type(model).__mro__:
        prefix = _LOST.get(cls.__name__) if cls.__module__.startswith("transformers.") else None
        if prefix is not None:
            return None if prefix.rstrip(".") in model._modules else prefix
    return None


def renamed(about: Description, rename: Rename) -> Description:
    """The description with other names for projections and parameters; it is that of one model."""
    return replace(
        about,
        configs={"": about.configs[""].renamed(rename)},
        shapes={rename(name): shape for name, shape in about.shapes.items()},
        whole=tuple(rename(name) for name in about.whole),
        convolutions=frozenset(rename(name) for name in about.convolutions),
    )


def renamed_keys(tensors: Mapping[str, _Value], about: Description, rename: Rename) -> dict[str, _Value]:
    """The tensors, or entries, of a file likewise, whose description has the old names.

    What belongs to no projection, such as cells that several share, keeps its key.
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
