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
            part, or after it where it begins with a prefix such as `add`, is the kind of projection: "q", "k", "v" or "out".
        fused: layers that stand in for several, stacked in this order, once a model's projections are fused.
    """

    parts: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def present(self, attention: nn.Module) -> list[str]:
        """The parts this layer has."""
        found = {part: child(attention, path) for part, path in self.parts.items()}
        return [part for part, layer in found.items() if layer is not None and not isinstance(layer, _CONTAINERS)]


_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.Identity)  # what `to_out` is, except where it is a layer itself
# Layers of attention layers that the block around calls in their place, by the class of the block.
CALLED_BY_BLOCK = {"LuminaNextDiTBlock": ("attn2", "to_out.0")}


# What names of rows of a layer begin with that has several projections in it and no standard name.
FUSED = ("fused", "img", "txt")
# Layers that some families have besides: each is a part that is named as it is.
_OWN_NAMES = ("to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t", "q_img", "k_img", "v_img")

# `add_*` project the second stream, of text, in the joint attention of SD3, Flux and kin.
DIFFUSERS = Naming(
    {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    | {"add_q": "add_q_proj", "add_k": "add_k_proj", "add_v": "add_v_proj", "add_out": "to_add_out"}
    | {path: path for path in _OWN_NAMES},
    {"to_qkv": ("q", "k", "v"), "to_kv": ("k", "v"), "to_added_qkv": ("add_q", "add_k", "add_v")},
)
CLIP = Naming({"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"})
TRANSFORMERS = Naming({"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"})  # its ViTs from version 5 on
T5 = Naming({"q": "q", "k": "k", "v": "v", "out": "o"})
# Some of its models, and nearly all before version 5; the output layer is `output.dense` of the module around, if not here.
QUERY = Naming({"query": "query", "key": "key", "value": "value", "proj": "proj"})


_PREFIXES = ("add", "to", *FUSED)
_KINDS = {"query": "q", "key": "k", "value": "v", "proj": "out"}


def naming_of(module: nn.Module) -> Naming | None:
    """The names of an attention layer of diffusers or transformers; None for every other module."""
    children = module._modules
    if children.get("to_q") is not None and children.get("to_v") is not None:
        return DIFFUSERS
    if any(cls.__module__.startswith("transformers.") for cls in type(module).__mro__):
        for naming in (TRANSFORMERS if children.get("o_proj") is not None else CLIP, T5):
            if all(children.get(naming.parts[part]) is not None for part in "qkv"):
                return naming
        if all(children.get(name) is not None for name in ("query", "key", "value")):
            return QUERY
    return None


def target_of(part: str) -> str:
    """The entry of `targets` that a part belongs to: "q" for "q", "add_q" and "to_q_t", "fc1" for "fc1_g"."""
    prefix, _, rest = part.partition("_")
    return _KINDS.get(part) or (rest if prefix in _PREFIXES else part).split("_")[0]


def part_of_name(projection: str) -> str:
    """The entry of `targets` for a projection of which only the name is known: "linear", every layer, for others' names."""
    own = projection.rpartition(".")[2]
    if own in PARTS:
        return own
    ours = own in DIFFUSERS.parts or own.partition("_")[0] in (*FUSED, "fc1")
    return target_of(own) if ours and target_of(own) in PARTS else "linear"


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
