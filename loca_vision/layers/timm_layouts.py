"""The names that timm's model families use for q, k, v, out, fc1 and fc2; edit this file to support a new family."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from loca_vision.functional.row_linear import Rows

# The names of separate query, key and value layers, and of the output layer, in timm 1.0. For a new family, add a row here or
# a branch in `_attention`.
_SEPARATE = (("q", "k", "v"), ("wq", "wk", "wv"), ("q_proj", "k_proj", "v_proj"))
_OUT = ("proj", "out_proj", "o_proj")


def _attention(path: str, module: nn.Module, children: dict[str, nn.Module]) -> list[tuple[str, str, Rows]]:
    """Return (part, child, rows) for each projection of an attention layer; empty for other modules."""
    found: list[tuple[str, str, Rows]] = []
    sizes: Any = getattr(module, "in_split", None)
    if "in_proj" in children and sizes:  # parallel blocks: MLP, q, k and v in one projection
        return list(_split(path, "in_proj", children, ("", "q", "k", "v"), sizes))
    for names in _SEPARATE:
        if all(name in children for name in names):
            found = [(part, name, None) for part, name in zip("qkv", names, strict=True)]
    if "qkv" in children:
        found = list(_fused(path, module, "qkv", children, "kv" if getattr(module, "use_global", False) else "qkv"))
    elif "kv" in children:  # an attention pool may have a learned query without a projection
        found = [("q", "q", None)] * ("q" in children) + list(_fused(path, module, "kv", children, "kv"))
    elif "qk" in children and "v" in children:
        found = [*_fused(path, module, "qk", children, "qk"), ("v", "v", None)]
    out = next((name for name in _OUT if name in children), None)
    return [*found, ("out", out, None)] if found and out else found


def _fused(
    path: str, module: nn.Module, child: str, children: dict[str, nn.Module], parts: str
) -> Iterator[tuple[str, str, Rows]]:
    """Yield the parts of a fused projection, which follow one another or, in some families, do so within every head."""
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
    """Yield the rows of each part, given its size, repeated for each head; a part with an empty name is skipped."""
    rows = getattr(children[child], "out_features", heads * sum(sizes))
    if rows != heads * sum(sizes):
        raise ValueError(f"{path}.{child} has {rows} rows, not {heads} x {tuple(sizes)} for {', '.join(filter(None, parts))}")
    for part, size, end in zip(parts, sizes, accumulate(sizes), strict=True):
        if part and heads == 1:
            yield part, child, slice(end - size, end)
        elif part:
            yield part, child, torch.arange(rows).view(heads, -1)[:, end - size : end].reshape(-1)


def _mlp(children: dict[str, nn.Module], *, inside_attention: bool) -> list[tuple[str, str, Rows]]:
    """Return fc1 and fc2 of an MLP; a gated MLP (SwiGLU) has its first layer split in two, fc1_g and fc1_x.

    Skip those of squeeze-and-excitation, which gate channels, and those that compute position biases inside attention layers.
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
