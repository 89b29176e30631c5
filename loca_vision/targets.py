"""Where a model keeps its projections: generators of targets, by structure, importing no model library."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.offload import stored
from loca_vision.projections import Naming, base_of, kind_of, naming_of
from loca_vision.projections import child as genuine_child
from loca_vision.rows import Rows


@dataclass(frozen=True)
class Target:
    """One projection: the rows of one linear layer that make up a part of an attention layer or an MLP.

    Args:
        name: path of the attention layer or MLP, a dot, and the part: `blocks.0.attn.q`.
        part: "q", "k", "v", "out", "fc1" or "fc2".
        layer_path, layer: the module that holds the weight.
        rows: a slice or an index (int64) of the weight's rows; None for all of them.
        attention: the attention layer, where it is adapted as a whole (diffusers, transformers).
    """

    name: str
    part: str
    layer_path: str
    layer: nn.Module
    rows: Rows = None
    attention: nn.Module | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q) of the projection. The layer must be linear."""
        if self.attention is not None:  # the weight may be quantised, or offloaded
            return self.layer.out_features, self.layer.in_features  # type: ignore[return-value]
        rows, cols = self.layer._parameters["weight"].shape  # type: ignore[union-attr]
        if isinstance(self.rows, slice):
            return len(range(*self.rows.indices(rows))), cols
        return (rows if self.rows is None else len(self.rows)), cols

    def weight(self) -> Tensor:
        """(p, q), these rows of the weight before any update, wherever it is kept.

        Raises:
            ValueError: it is not a matrix of floating-point numbers, or has none yet.
        """
        weight = readable_weight(self.layer, self.name).detach()
        if weight.device.type == "meta":
            raise ValueError(f"{self.name}: its weight has no values yet, which the adapter would start from")
        return weight if self.rows is None else weight[self.rows]


def readable_weight(layer: Any, name: str) -> Tensor:
    """The weight of a layer, past the wrappers that peft puts around it, for those updates that depend on it.

    Raises:
        ValueError: it is not a matrix of floating-point numbers.
    """
    layer = base_of(layer)
    weight: Any = stored(layer, "weight") if "weight" in layer._parameters else None
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(
            f"{name} is a {type(layer).__module__}.{type(layer).__name__}: its weight is no matrix of floating-point numbers, "
            "which the adapter depends on"
        )
    return weight


# The layers of timm 1.0 by the names of their children; `*` stands for whatever follows in the model's own names.
_SEPARATE = (("q", "k", "v"), ("wq", "wk", "wv"), ("q_proj", "k_proj", "v_proj"))
_OUT = ("proj", "out_proj", "o_proj")


def find_targets(model: nn.Module, parts: Sequence[str]) -> Iterator[Target]:
    """Every target of the wanted parts, in the order of the model's modules, linear or not.

    Raises:
        ValueError: a fused projection whose rows do not divide into its parts.
    """
    attention_paths: list[str] = []
    for path, module in model.named_modules():
        naming = naming_of(module)
        if naming is not None:
            yield from _of_attention(path, module, naming, parts)
            continue
        children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Identity)}
        attention = _attention(path, module, children)
        if attention:
            attention_paths.append(f"{path}.")
        mlp = _mlp(children, inside_attention=path.startswith(tuple(attention_paths)))
        for part, child, rows in (*attention, *mlp):
            if kind_of(part) in parts:
                where = f"{path}." if path else ""
                yield Target(f"{where}{part}", kind_of(part), f"{where}{child}", children[child], rows)


def _of_attention(path: str, attention: nn.Module, naming: Naming, parts: Sequence[str]) -> Iterator[Target]:
    where = f"{path}." if path else ""
    for part in naming.present(attention):
        if kind_of(part) in parts:
            place = naming.parts[part]
            layer = genuine_child(attention, place)
            assert layer is not None
            yield Target(f"{where}{part}", kind_of(part), f"{where}{place}", layer, attention=attention)


def _attention(path: str, module: nn.Module, children: dict[str, nn.Module]) -> list[tuple[str, str, Rows]]:
    """(part, child, rows) of an attention layer; empty where the module is none."""
    found: list[tuple[str, str, Rows]] = []
    sizes: Any = getattr(module, "in_split", None)
    if "in_proj" in children and sizes:  # parallel blocks: MLP, q, k and v in one projection
        return list(_split(path, "in_proj", children, ("", "q", "k", "v"), sizes))
    for names in _SEPARATE:
        if all(name in children for name in names):
            found = [(part, name, None) for part, name in zip("qkv", names, strict=True)]
    if "qkv" in children:
        found = list(_fused(path, module, "qkv", children, "kv" if getattr(module, "use_global", False) else "qkv"))
    elif "kv" in children:  # a pool may have a learned query without a projection
        found = [("q", "q", None)] * ("q" in children) + list(_fused(path, module, "kv", children, "kv"))
    elif "qk" in children and "v" in children:
        found = [*_fused(path, module, "qk", children, "qk"), ("v", "v", None)]
    out = next((name for name in _OUT if name in children), None)
    return [*found, ("out", out, None)] if found and out else found


def _fused(
    path: str, module: nn.Module, child: str, children: dict[str, nn.Module], parts: str
) -> Iterator[tuple[str, str, Rows]]:
    """The parts of a fused projection: one after the other, or, in some families, one after the other in every head."""
    heads = getattr(module, "num_heads", 1)
    key, value = getattr(module, "key_dim", None), getattr(module, "val_dim", None)
    if key is not None and value is not None:  # LeViT, EfficientFormer, TinyViT
        return _split(path, child, children, tuple(parts), [value if p == "v" else key for p in parts], heads)
    rows = getattr(children[child], "out_features", len(parts))
    if rows % len(parts):
        raise ValueError(f"{path}.{child} has {rows} rows, which do not divide into {', '.join(parts)}")
    if getattr(module, "head_first", False):  # MaxViT's attention over the last axis
        return _split(path, child, children, tuple(parts), [rows // len(parts) // heads] * len(parts), heads)
    return _split(path, child, children, tuple(parts), [rows // len(parts)] * len(parts))


def _split(
    path: str, child: str, children: dict[str, nn.Module], parts: Sequence[str], sizes: Sequence[int], heads: int = 1
) -> Iterator[tuple[str, str, Rows]]:
    """`sizes` rows for each part, repeated for each head; an empty part is passed over."""
    rows = getattr(children[child], "out_features", heads * sum(sizes))
    if rows != heads * sum(sizes):
        raise ValueError(f"{path}.{child} has {rows} rows, not {heads} x {tuple(sizes)} for {', '.join(filter(None, parts))}")
    for part, size, end in zip(parts, sizes, accumulate(sizes), strict=True):
        if part and heads == 1:
            yield part, child, slice(end - size, end)
        elif part:
            yield part, child, torch.arange(rows).view(heads, -1)[:, end - size : end].reshape(-1)


def _mlp(children: dict[str, nn.Module], *, inside_attention: bool) -> list[tuple[str, str, Rows]]:
    """fc1 and fc2 of an MLP; a gated one (SwiGLU) has its first layer in two, fc1_g and fc1_x.

    Not those of squeeze-and-excitation, which gate channels, nor those that make position biases inside attention layers.
    """
    first = [name for name in ("fc1", "fc1_g", "fc1_x") if name in children]
    if not first or "fc2" not in children:
        return []
    if "gate" in children and not isinstance(children["fc2"], nn.Linear):
        return []
    widths = getattr(children[first[0]], "in_features", None), getattr(children["fc2"], "out_features", None)
    if inside_attention and widths[0] != widths[1]:
        return []
    return [(name, name, None) for name in (*first, "fc2")]
