"""Translate the names that the authors of Flux and SD3 gave their transformers' layers to those of diffusers.

If one layer there is several in diffusers (a fused qkv), its rows say which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Rule = Literal["whole", "equal", "single block", "swapped", "swapped in the last block"]


@dataclass(frozen=True)
class Layer:
    """A layer of a file, as the diffusers modules that it consists of.

    Args:
        modules: their paths, in the order of the layer's rows.
        rule: how its rows are divided: not at all; in equal parts; one seventh each for q, k and v, and the rest for the MLP;
            or not divided but with both halves exchanged, which in SD3 holds for the second stream of the last block.
        times: the number of rows over that of columns, if another model has a layer of that name too; 0 for any.
    """

    modules: tuple[str, ...]
    rule: Rule = "whole"
    times: int = 0

    def rows(self, count: int, columns: int | None) -> list[tuple[str, Tensor]]:
        """Return each module, and which of the layer's `count` rows are its own, in its order.

        Args:
            columns: the layer's number of columns; None if unknown, as for a bias.

        Raises:
            ValueError: the rows cannot be divided like that.
        """
        if self.times and columns is not None and count != self.times * columns:
            raise ValueError(
                f"{self.modules[0]}: {count} rows for {columns} columns, where the layer has {self.times} times as many"
            )
        swapped = self._is_swapped(count, columns)
        parts = {"equal": [1] * len(self.modules), "single block": [1, 1, 1, 4]}.get(self.rule, [2 if swapped else 1])
        if count % sum(parts):
            raise ValueError(f"{count} rows are not {sum(parts)} equal parts, of which {', '.join(self.modules)} are made")
        every = torch.arange(count)
        if swapped:
            every = torch.cat([every[count // 2 :], every[: count // 2]])
        sizes = [count] if len(self.modules) == 1 else [part * (count // sum(parts)) for part in parts]
        return list(zip(self.modules, torch.split(every, sizes), strict=True))

    def _is_swapped(self, count: int, columns: int | None) -> bool:
        if self.rule == "swapped in the last block":
            if columns is None:
                raise ValueError(f"{self.modules[0]}: in which order its rows are only the layer's weight tells")
            return count == 2 * columns
        return self.rule == "swapped"


_QKV, _ADDED = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
# For a block's layer, by what follows the block's number: the rest of the module's path.
_DOUBLE = {
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp_2": "ff.net.2",
    "txt_mlp_2": "ff_context.net.2",
    "img_mod_lin": "norm1.linear",
    "txt_mod_lin": "norm1_context.linear",
}
_SINGLE = {"linear2": "proj_out", "modulation_lin": "norm.linear"}
_JOINT = {
    "x_block_attn_proj": "attn.to_out.0",
    "x_block_attn2_proj": "attn2.to_out.0",
    "context_block_attn_proj": "attn.to_add_out",
    "x_block_mlp_fc1": "ff.net.0.proj",
    "x_block_mlp_fc2": "ff.net.2",
    "context_block_mlp_fc1": "ff_context.net.0.proj",
    "context_block_mlp_fc2": "ff_context.net.2",
    "x_block_adaLN_modulation_1": "norm1.linear",
}
_OTHERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder_mlp_2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder_mlp_0": "time_text_embed.text_embedder.linear_1",
    "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
    "x_embedder_proj": "pos_embed.proj",
    "final_layer_linear": "proj_out",
}


def layer_of(name: str) -> Layer | None:
    """Return the layer of an original transformer by its name with underscores for dots (`double_blocks_0_img_attn_qkv`)."""
    if name in _OTHERS:
        return Layer((_OTHERS[name],))
    if name == "final_layer_adaLN_modulation_1":
        return Layer(("norm_out.linear",), "swapped")
    match = re.fullmatch(r"(double|single|joint)_blocks_(\d{1,4})_(\w+)", name)
    if not match:
        return None
    kind, number, rest = match[1], match[2], match[3]
    if kind == "single":
        return _of_single(f"single_transformer_blocks.{number}.", rest)
    return (_of_double if kind == "double" else _of_joint)(f"transformer_blocks.{number}.", rest)


def _of_double(block: str, rest: str) -> Layer | None:
    if rest in ("img_attn_qkv", "txt_attn_qkv"):
        return _several(f"{block}attn.", _QKV if rest.startswith("img") else _ADDED)
    if rest in ("img_mlp_0", "txt_mlp_0"):  # gated in Flux 2, which has another name for it
        return Layer((f"{block}{'ff' if rest.startswith('img') else 'ff_context'}.net.0.proj",), times=4)
    return Layer((block + _DOUBLE[rest],)) if rest in _DOUBLE else None


def _of_single(block: str, rest: str) -> Layer | None:
    if rest == "linear1":
        return Layer((*(f"{block}attn.{part}" for part in _QKV), f"{block}proj_mlp"), "single block", times=7)
    if rest == "qkv":  # the part of linear1 that XLabs adapts
        return _several(f"{block}attn.", _QKV)
    return Layer((block + _SINGLE[rest],)) if rest in _SINGLE else None


def _of_joint(block: str, rest: str) -> Layer | None:
    if rest in ("x_block_attn_qkv", "x_block_attn2_qkv"):
        return _several(f"{block}{'attn2' if '2' in rest else 'attn'}.", _QKV)
    if rest == "context_block_attn_qkv":
        return _several(f"{block}attn.", _ADDED)
    if rest == "context_block_adaLN_modulation_1":
        return Layer((f"{block}norm1_context.linear",), "swapped in the last block")
    return Layer((block + _JOINT[rest],)) if rest in _JOINT else None


def _several(before: str, parts: tuple[str, ...]) -> Layer:
    return Layer(tuple(before + part for part in parts), "equal")
