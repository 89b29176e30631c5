"""How attention layers that are adapted as a whole name their projections."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loca_vision.checks import PARTS


@dataclass(frozen=True)
class Naming:
    """
    Args:
        parts: the linear layer of each projection, by its path in the attention layer. What stands before the first `_` of a
            part, or after it where it begins with `add`, is the kind of projection: "q", "k", "v" or "out".
        fused: layers that stand in for several, stacked in this order, once a model's projections are fused.
    """

    parts: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def present(self, attention: nn.Module) -> list[str]:
        """The parts this layer has."""
        return [part for part, path in self.parts.items() if child(attention, path) is not None]


# `add_*` project the second stream, of text, in the joint attention of SD3, Flux and kin.
DIFFUSERS = Naming(
    {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    | {"add_q": "add_q_proj", "add_k": "add_k_proj", "add_v": "add_v_proj", "add_out": "to_add_out"},
    {"to_qkv": ("q", "k", "v"), "to_kv": ("k", "v"), "to_added_qkv": ("add_q", "add_k", "add_v")},
)
CLIP = Naming({"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"})
TRANSFORMERS = Naming({"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"})  # its ViTs from version 5 on
T5 = Naming({"q": "q", "k": "k", "v": "v", "out": "o"})


def naming_of(module: nn.Module) -> Naming | None:
    """The names of an attention layer of diffusers or transformers; None for every other module."""
    children = module._modules
    if children.get("to_q") is not None and children.get("to_v") is not None:
        return DIFFUSERS
    if any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__):
        for naming in (TRANSFORMERS if children.get("o_proj") is not None else CLIP, T5):
            if all(children.get(naming.parts[part]) is not None for part in "qkv"):
                return naming
    return None


def target_of(part: str) -> str:
    """The entry of `targets` that a part belongs to: "q" for "q" and "add_q", "fc1" for "fc1_g"."""
    return part.removeprefix("add_").split("_")[0]


def part_of_name(projection: str) -> str:
    """The entry of `targets` that a projection belongs to by its name: "linear" for one that is no part of a known layer."""
    own = projection.rpartition(".")[2]
    return next((part for part in (own, target_of(own)) if part in PARTS), "linear")


def child(module: nn.Module, path: str) -> nn.Module | None:
    """The genuine child at a path such as `to_out.0`, past every property that would answer in its place."""
    first, _, rest = path.partition(".")
    found = module._modules.get(first)
    if not rest or found is None:
        return found
    return found._modules.get(rest) if isinstance(found, nn.ModuleList) else None  # of a Sequential the whole is called


def base_of(layer: Any) -> Any:
    """The linear layer inside the wrappers that peft puts around it."""
    while isinstance(getattr(layer, "base_layer", None), nn.Module):
        layer = layer.base_layer
    return layer
