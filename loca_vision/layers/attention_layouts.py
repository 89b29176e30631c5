"""The names of the projections in attention layers that are adapted as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loca_vision.checks import PARTS


@dataclass(frozen=True)
class Naming:
    """The names of an attention layer's projections.

    Args:
        parts: the path of each projection's linear layer in the attention layer, by part. The text before the first `_` of a
            part, or after it if the part begins with a prefix such as `add`, is the kind of projection: "q", "k", "v" or "out".
        fused: the layers that replace several others once a model's projections are fused, with the parts they stack, in order.
    """

    parts: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def present(self, attention: nn.Module) -> list[str]:
        """Return the parts that this layer has."""
        found = {part: child(attention, path) for part, path in self.parts.items()}
        return [part for part, layer in found.items() if layer is not None and not isinstance(layer, _CONTAINERS)]


_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.Identity)  # the types of `to_out` if it is not a layer itself
# Layers inside an attention layer that are called by the surrounding block instead, by the class of the block.
CALLED_BY_BLOCK = {"LuminaNextDiTBlock": ("attn2", "to_out.0")}


# The prefixes of the names given to row ranges of a layer that holds several projections and has no standard name.
FUSED = ("fused", "img", "txt")
# Additional layers of some families; each is a part named after the layer.
_OWN_NAMES = ("to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t", "q_img", "k_img", "v_img")

# `add_*` project the second stream, the text, in the joint attention of SD3, Flux and related models.
DIFFUSERS = Naming(
    {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
    | {"add_q": "add_q_proj", "add_k": "add_k_proj", "add_v": "add_v_proj", "add_out": "to_add_out"}
    | {path: path for path in _OWN_NAMES},
    {"to_qkv": ("q", "k", "v"), "to_kv": ("k", "v"), "to_added_qkv": ("add_q", "add_k", "add_v")},
)
CLIP = Naming({"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"})
TRANSFORMERS = Naming({"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "o_proj"})  # transformers' ViTs since version 5
T5 = Naming({"q": "q", "k": "k", "v": "v", "out": "o"})
# Some models of transformers, and nearly all before version 5; the output layer is either here or `output.dense` of the
# surrounding module.
QUERY = Naming({"query": "query", "key": "key", "value": "value", "proj": "proj"})


_PREFIXES = ("add", "to", *FUSED)
_KINDS = {"query": "q", "key": "k", "value": "v", "proj": "out"}


def naming_of(module: nn.Module) -> Naming | None:
    """Return the names of an attention layer of diffusers or transformers, or None for any other module."""
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
    """Return the entry of `targets` that a part belongs to: "q" for "q", "add_q" and "to_q_t", "fc1" for "fc1_g"."""
    prefix, _, rest = part.partition("_")
    return _KINDS.get(part) or (rest if prefix in _PREFIXES else part).split("_")[0]


def part_of_name(projection: str) -> str:
    """Return the entry of `targets` for a projection known only by name, or "linear", every layer, for an unfamiliar name."""
    own = projection.rpartition(".")[2]
    if own in PARTS:
        return own
    ours = own in DIFFUSERS.parts or own.partition("_")[0] in (*FUSED, "fc1")
    return target_of(own) if ours and target_of(own) in PARTS else "linear"


def child(module: nn.Module, path: str) -> nn.Module | None:
    """Return the actual child module at a path such as `to_out.0`, bypassing any property of the same name."""
    first, _, rest = path.partition(".")
    found = module._modules.get(first)
    if not rest or found is None:
        return found
    return found._modules.get(rest) if isinstance(found, nn.ModuleList) else None  # a Sequential is called as a whole


def base_of(layer: Any) -> Any:
    """Return the linear layer inside the wrappers that peft puts around it."""
    while isinstance(getattr(layer, "base_layer", None), nn.Module):
        layer = layer.base_layer
    return layer
