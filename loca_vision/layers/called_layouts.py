"""The names of projections in attention layers of diffusers that are adapted layer by layer; some layers hold several.

Attention layers in `attention_layouts.py` are adapted as a whole. Layers in neither table are found as "linear", by their path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from torch import nn

from loca_vision.functional.row_linear import Rows
from loca_vision.layers.attention_layouts import base_of, target_of
from loca_vision.layers.linear_layouts import below, features

# By the path of the layer: its part or, if its rows make up several projections, their names in order.
_LAYOUTS: tuple[Mapping[str, str | tuple[str, ...]], ...] = (
    {"to_qkv_mlp_proj": ("fused_q", "fused_k", "fused_v", "fused_fc1"), "to_out": "out"},  # Flux.2, also the MLP's first layer
    {"to_qkv": ("fused_q", "fused_k", "fused_v"), "to_out": "out"},
    {"to_q": "q", "to_kv": ("fused_k", "fused_v"), "to_out": "out"},
    {"to_query": "q", "to_key": "k", "to_value": "v", "out_layer": "out"},  # Kandinsky from 5 on
    {"img_qkv_proj": ("img_q", "img_k", "img_v"), "txt_kv_proj": ("txt_k", "txt_v"), "to_out.0": "out"},  # PRX
    {"img_attn_qkv": ("img_q", "img_k", "img_v"), "img_attn_proj": "out"},  # JoyImage
    {"txt_attn_qkv": ("txt_q", "txt_k", "txt_v"), "txt_attn_proj": "out"},
    {"qkv": ("fused_q", "fused_k", "fused_v"), "proj": "out"},  # SANA-WM, and its branch for the camera
    {"q_linear": "q", "kv_linear": ("fused_k", "fused_v"), "proj": "out"},
    {"q_proj_cam": "q", "k_proj_cam": "k", "v_proj_cam": "v", "out_proj_cam": "out"},
    {"q_proj": "q", "k_proj": "k", "v_proj": "v", "c_proj": "out"},  # the pooling of Hunyuan-DiT
)


def called_projections(module: nn.Module) -> Iterator[tuple[str, str, str, nn.Module, Rows]]:
    """Yield (name, part, path, layer, rows) for the projections of an attention layer in the table; nothing for others."""
    if not module._modules or not any(cls.__module__.startswith("diffusers.") for cls in type(module).__mro__):
        return
    for layout in _LAYOUTS:
        layers: dict[str, Any] = {path: below(module, path) for path in layout}
        if any(layer is None or features(base_of(layer)) is None for layer in layers.values()):
            continue
        for path, parts in layout.items():
            layer = base_of(layers[path])
            if isinstance(parts, str):
                yield path, parts, path, layer, None
                continue
            sizes = _sizes(module, parts, layer.out_features)
            for name, size, end in zip(parts, sizes, accumulate(sizes), strict=False):
                yield name, target_of(name), path, layer, slice(end - size, end)


def _sizes(module: Any, parts: Sequence[str], rows: int) -> list[int]:
    """Return the number of rows of each part; empty if they do not add up, so that the layer is found as a whole."""
    if "fused_fc1" in parts:
        inner = module.inner_dim
        return [inner] * 3 + [rows - 3 * inner] if 3 * inner < rows else []
    # Differential attention has two sets of queries and keys, and one set of values.
    twice = getattr(module, "use_differential", False) is True
    shares = [2 if twice and part[-1] in "qk" else 1 for part in parts]
    return [share * rows // sum(shares) for share in shares] if rows % sum(shares) == 0 else []
