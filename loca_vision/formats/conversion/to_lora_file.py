"""Convert any update of weights to a LoRA file for other programs, by its largest singular values if it has no factors."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from loca_vision.formats.adapter_file import prefix_of
from loca_vision.formats.conversion.conversion_error import LayerFidelity, left_out_entirely
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.formats.lora_files.kohya_writer import has_name, write_kohya_lora
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair, cut
from loca_vision.formats.lora_files.writer import write_diffusers_lora, write_peft_lora
from loca_vision.formats.lora_files.written_layers import COMPONENTS, LoraLayers

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
    xl: bool = False,
) -> list[LayerFidelity]:
    """Write the LoRA of a given rank closest to an update. A DoRA keeps its factors and magnitudes.

    Args:
        layout: the keys: "diffusers" or "kohya" for a pipeline's components, or "peft", a folder for one model.
        rank: the rank of every module, lowered to the one that loses nothing where that is lower; None keeps existing factors.
        dtype: the dtype of the factors.
        base_model: the model that the file says it is for, for "peft" as the hub names it; by default as in the source.
        skip: leave out what these keys cannot hold: tensors trained as a whole (except for "peft"), differences of biases and
            norms, modules without a name, updates that depend on the weight and are not DoRAs of whole rows.
        xl: for "kohya": the adapter is for Stable Diffusion XL, if its modules do not tell.

    Returns:
        What each layer keeps, including those that are left out.

    Raises:
        ValueError: the rank is below 1, or None where the update has no factors; or, without `skip`, something does not fit.
        OSError: as `write_atomically`.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}: expected a whole number from 1 up")
    dropped = _without_room(source, layout)
    refuse_unless(skip, dropped)
    gone = {loss.layer for loss in dropped}
    modules = [module for module in source.shapes if module not in gone]
    pairs, losses = _pairs(source, modules, rank)
    magnitudes = {module: source.decomposed[module][1] for module in modules if module in source.decomposed}
    kernels = {module: kernel for module, kernel in source.kernels.items() if module in pairs}
    layers = LoraLayers(pairs, kernels, magnitudes)
    base = base_model or source.base_model
    if layout == "peft":
        layers, whole = _without_component(layers, source.whole)
        hub_name = base if "/" in base else None  # a name without "/" is a class's, of a model that is not on the hub
        write_peft_lora(path, **vars(layers), whole=whole, base_model=hub_name, overwrite=overwrite)
    elif layout == "diffusers":
        write_diffusers_lora(path, **vars(layers), dtype=dtype)
    else:
        write_kohya_lora(path, **vars(layers), dtype=dtype, base_model=base, xl=xl)
    return [*losses, *dropped]


def refuse_unless(skip: bool, dropped: Iterable[LayerFidelity]) -> None:
    """Refuse to leave anything out without `skip`.

    Raises:
        ValueError: something would be left out; the error names the first, and the reason.
    """
    first = next(iter(dropped), None)
    if first is not None and not skip:
        raise ValueError(f"{first.layer}: {first.why}; it can be left out (skip)")


def not_read_by_diffusers(modules: Iterable[str]) -> dict[str, str]:
    """Return the components that `load_lora_weights` of diffusers (0.42) silently ignores, and why."""
    why: dict[str, str] = {}
    for module in modules:
        component, _, path = module.partition(".")
        if re.search(r"\.block\.\d+\.layer\.\d+\.", f".{path}"):
            why[component] = "which has no loader for a T5"
        elif component == "text_encoder_3" or (component.startswith("text_encoder") and not _is_of_clip(path)):
            why[component] = "which reads CLIP's text encoders only, the first and the second"
        elif component == "transformer_2":
            why[component] = "unless it is told load_into_transformer_2=True"
    return dict(sorted(why.items()))


def _is_of_clip(path: str) -> bool:
    return path.removeprefix("text_model.").startswith(("encoder.layers.", "embeddings.", "text_projection"))


def _pairs(
    source: WeightDeltas, modules: Iterable[str], rank: int | None
) -> tuple[dict[str, LowRankPair], list[LayerFidelity]]:
    pairs, losses = {}, []
    for module in modules:
        shape = source.shapes[module]
        if module in source.decomposed:
            pairs[module] = pair = source.decomposed[module][0]
            if rank is not None and pair.rank > rank:
                raise ValueError(f"rank={rank}: {module} is a DoRA of rank {pair.rank}, whose factors are kept as they are")
            losses.append(LayerFidelity(module, shape, pair.rank, math.nan, 0.0))
            continue
        kept = cut(module, source.read(module, None), rank)
        pairs[module] = kept.pair
        losses.append(LayerFidelity(module, shape, kept.pair.rank, kept.norm, kept.error, squares=kept.squares))
    return pairs, losses


def _without_room(source: WeightDeltas, layout: KeyFormat) -> list[LayerFidelity]:
    """Return what the keys of this layout cannot hold, with its size if known."""
    dropped = []
    for module, shape in source.shapes.items():
        dora = module in source.needs_weight
        if dora and module not in source.decomposed:
            why = "its update (DoRA) depends on the weight; name the weights (--base), or merge it into them"
            dropped.append(left_out_entirely(module, shape, math.nan, why))
        elif layout == "kohya" and not has_name(module):
            why = "kohya's keys have names for the UNet and CLIP text encoders of Stable Diffusion only"
            dropped.append(left_out_entirely(module, shape, math.nan if dora else norm_of(source.matrix(module)), why))
    if layout != "peft":
        why = f"it was trained whole, for which {layout} keys have no room"
        dropped += [left_out_entirely(name, tuple(tensor.shape), math.nan, why) for name, tensor in source.whole.items()]
    why = f"it is the difference of a parameter that is not a matrix, for which {layout} keys have no room"
    return dropped + [
        left_out_entirely(name, tuple(tensor.shape), norm_of(tensor), why) for name, tensor in source.differences.items()
    ]


def norm_of(tensor: Tensor) -> float:
    """Return the Frobenius norm, accumulated in float64."""
    return float(tensor.detach().double().norm())


def _without_component(layers: LoraLayers, whole: Mapping[str, Tensor]) -> tuple[LoraLayers, dict[str, Tensor]]:
    """Use the names of a single model, since peft's files are for one."""
    components = {module.partition(".")[0] for module in layers.pairs}
    if not components & set(COMPONENTS):
        return layers, dict(whole)
    if len(components) > 1:
        raise ValueError(f"peft's files are for one model, and this update is for {', '.join(sorted(components))}")
    prefix = prefix_of(components.pop())
    short = LoraLayers(*({name[len(prefix) :]: of for name, of in part.items()} for part in vars(layers).values()))
    return short, {name[len(prefix) :]: tensor for name, tensor in whole.items()}
