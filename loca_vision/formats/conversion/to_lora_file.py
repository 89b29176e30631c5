"""From any update of weights to a LoRA file of others, by its largest singular values where it has no factors yet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from loca_vision.formats.adapter_file import prefix_of
from loca_vision.formats.conversion.conversion_error import LayerFidelity
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.formats.lora_writer import write_diffusers_lora, write_kohya_lora, write_peft_lora
from loca_vision.formats.low_rank_pair import LowRankPair, cut
from loca_vision.layers.projection_rows import projections_of_modules

KeyFormat = Literal["diffusers", "kohya", "peft"]


def to_lora(
    source: WeightDeltas,
    path: str | os.PathLike[str],
    *,
    layout: KeyFormat,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    skip: bool = False,
) -> list[LayerFidelity]:
    """Write the LoRA of some rank closest to an update.

    Args:
        layout: the keys: "diffusers" or "kohya" for a pipeline's components, or "peft", a folder for one model.
        rank: of every module, or, where that is larger, the one that loses nothing; None keeps the factors that there are.
        dtype: of the factors.
        skip: leave out tensors trained whole, which only "peft" has room for.

    Raises:
        ValueError: a rank below 1; None where the update has no factors; whole tensors; modules without a name in this layout.
        OSError: as `write_atomically`.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}: it is a whole number from 1 up")
    if source.whole and layout != "peft" and not skip:
        first = next(iter(source.whole))
        raise ValueError(f"{first} was trained whole, for which {layout} keys have no room; it can be left out (skip)")
    pairs, losses = {}, []
    for module, shape in source.shapes.items():
        kept = cut(module, source.read(module, None), rank)
        pairs[module] = kept.pair
        losses.append(LayerFidelity(module, shape, kept.pair.rank, kept.norm, kept.error))
    if layout == "peft":
        names, whole = _without_component(pairs, source.whole)
        write_peft_lora(path, names, whole=whole, base_model=base_model, overwrite=overwrite)
    else:
        (write_diffusers_lora if layout == "diffusers" else write_kohya_lora)(path, pairs, dtype=dtype)
    return losses


def not_read_by_diffusers(source: WeightDeltas) -> list[str]:
    """The components that `load_lora_weights` of diffusers passes over without a word: it has no loader for a T5."""
    return sorted({module.partition(".")[0] for module in source.shapes if ".SelfAttention." in module})


def _without_component(
    pairs: Mapping[str, LowRankPair], whole: Mapping[str, Tensor]
) -> tuple[dict[str, LowRankPair], dict[str, Tensor]]:
    """By the names of one model: peft's files are for one."""
    if not projections_of_modules(pairs):
        return dict(pairs), dict(whole)
    components = {module.partition(".")[0] for module in pairs}
    if len(components) > 1:
        raise ValueError(f"peft's files are for one model, and this update is for {', '.join(sorted(components))}")
    prefix = prefix_of(components.pop())
    return {m[len(prefix) :]: pair for m, pair in pairs.items()}, {name[len(prefix) :]: t for name, t in whole.items()}
