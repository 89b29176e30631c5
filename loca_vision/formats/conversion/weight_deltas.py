"""Updates of weights from wherever they come: adapters of every kind, LoRA files, two checkpoints; by module, one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loca_vision.formats.adapter_file import (
    FILE_NAME,
    METADATA_KEY,
    Description,
    check_values,
    part_of,
    prefix_of,
    read_description,
)
from loca_vision.formats.lora_keys import canonical
from loca_vision.formats.lora_reader import read_lora
from loca_vision.formats.low_rank_pair import LowRankPair
from loca_vision.layers.projection_rows import ProjectionRows, rows_of_target
from loca_vision.methods.update import Update
from loca_vision.storage.safetensors_file import open_safetensors
from loca_vision.storage.sharded_weights import Weights, open_weights

Others = Literal["refuse", "skip", "whole"]
_MATRICES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class WeightDeltas:
    """
    Args:
        shapes: (p, q) of the weights that are updated, by module: `unet.mid_block...attn1.to_q`, `blocks.0.attn.qkv`. Of a
            convolution q is in_channels * kh * kw, as `weight.flatten(1)` has it.
        read: the update of one, as a matrix or as its factors. Updates in `needs_weight` need the weight (p, q).
        whole: tensors trained whole, by the parameter's name.
        kernels: (kh, kw) of the modules that are convolutions, (1, 1) included; the others are linear.
        differences: what is to be added to parameters that are no matrix of an update, such as biases, by name.
        needs_weight: the modules whose update depends on the weight (DoRA).
        left_out: what is not in here, by key, and why.
        name, base_model: of the adapter.
    """

    shapes: Mapping[str, tuple[int, int]]
    read: Callable[[str, Tensor | None], Tensor | LowRankPair]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    kernels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    differences: Mapping[str, Tensor] = field(default_factory=dict)
    needs_weight: Collection[str] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    name: str = "default"
    base_model: str = "unknown"

    def matrix(self, module: str, weight: Tensor | None = None) -> Tensor:
        """The update of a module's weight, (p, q) in float32 or float64."""
        update = self.read(module, weight)
        return update.delta() if isinstance(update, LowRankPair) else update


def read_source(
    path: str | os.PathLike[str], places: Sequence[ProjectionRows] | None = None, *, skip: bool = False
) -> WeightDeltas:
    """An adapter file of this library, of any kind, or a LoRA file of peft, diffusers or kohya.

    Args:
        places: the model's projections (`projections_in`), needed for an adapter of a single model; the names of a
            pipeline's components tell where its projections are.
        skip: as in `read_lora`.

    Raises:
        FileNotFoundError, ValueError: it is not there, not sound, or of projections whose weights are not known.
    """
    file = Path(path)
    if file.is_dir() and (file / FILE_NAME).exists():
        file = file / FILE_NAME
    if file.is_dir() or not _is_adapter(file):
        lora = read_lora(file, skip=skip)
        pairs = _without_empty_kinds(lora.pairs)
        shapes = {module: pair.shape for module, pair in pairs.items()}
        return WeightDeltas(shapes, lambda module, _: pairs[module], lora.whole, left_out=lora.skipped)
    with open_safetensors(file) as opened:
        about = read_description(opened.metadata, opened.entries)
        tensors = opened.tensors()
        check_values(tensors, about)
        return _of_adapter(about, tensors, {place.projection: place for place in places or ()})


def _without_empty_kinds(pairs: Mapping[str, LowRankPair]) -> dict[str, LowRankPair]:
    """Without projections that have zeros wherever they are: kohya's keys may have one for the sake of diffusers."""
    filled = {_kind(module) for module, pair in pairs.items() if pair.up.any() and pair.down.any()}
    return {module: pair for module, pair in pairs.items() if _kind(module) in filled} or dict(pairs)


def _kind(module: str) -> tuple[str, str]:
    """The component and the name of a projection: the same in every layer."""
    return module.partition(".")[0], module.removesuffix(".0").rpartition(".")[2]


def _is_adapter(file: Path) -> bool:
    with open_safetensors(file) as opened:
        return METADATA_KEY in opened.metadata


def _of_adapter(about: Description, tensors: dict[str, Tensor], known: Mapping[str, ProjectionRows]) -> WeightDeltas:
    updates: dict[str, list[tuple[ProjectionRows, Update]]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    for component, config in about.configs.items():
        part = about.of(component)
        for projection, shape in part.shapes.items():
            name = prefix_of(component) + projection
            place = known.get(name) or (rows_of_target(canonical(name)) if component else None)
            if place is None:
                raise ValueError(f"{name}: which rows of which weight it is only the model tells; name the model")
            if place.size is not None and (place.count(place.size[0]), place.size[1]) != shape:
                raise ValueError(f"{name} is {shape} in the file, which does not fit the model's {place.module} {place.size}")
            shapes[place.module] = place.size or shape
            update = config.from_tensors(projection, shape, part_of(tensors, component))
            updates.setdefault(place.module, []).append((place, update))

    def read(module: str, weight: Tensor | None) -> Tensor | LowRankPair:
        return _joined(updates[module], shapes[module], weight)

    whole = {name: tensors[f"full.{name}"] for name in about.whole}
    needing = {module for module, there in updates.items() if any(update.needs_weight for _, update in there)}
    return WeightDeltas(shapes, read, whole, needs_weight=needing, name=about.name, base_model=about.base_model)


@torch.no_grad()
def _joined(
    updates: Sequence[tuple[ProjectionRows, Update]], shape: tuple[int, int], weight: Tensor | None
) -> Tensor | LowRankPair:
    factors = [(place, update.factors()) for place, update in updates]
    if all(pair is not None for _, pair in factors):
        return LowRankPair(
            torch.cat([pair[1] for _, pair in factors if pair]),
            torch.cat([_placed(place, pair[0], shape[0]) for place, pair in factors if pair], 1),
        )
    result = torch.zeros(shape)
    for place, update in updates:
        if update.needs_weight and weight is None:
            raise ValueError(f"{place.projection}: its update (DoRA) depends on the weight; merge it into the weights instead")
        delta = update.delta(weight=None if weight is None else place.taken(weight))
        if place.rows is None:
            result += delta
        else:
            result[place.rows] += delta
    return result


def _placed(place: ProjectionRows, up: Tensor, rows: int) -> Tensor:
    """B of a projection as that of the whole weight, whose other rows it leaves alone."""
    whole = up.new_zeros(rows, up.shape[1])
    whole[slice(None) if place.rows is None else place.rows] = up
    return whole


# The difference of two checkpoints


@contextmanager
def open_difference(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    wanted: Callable[[str], bool],
    *,
    component: str = "",
    others: Others = "refuse",
) -> Iterator[WeightDeltas]:
    """A fully fine-tuned checkpoint minus its base, of the weights that changed.

    Args:
        base, tuned: as `open_weights` takes them.
        wanted: whether an update of that module can be told; its weight must be a matrix then.
        component: of the pipeline that both are; it goes before every name.
        others: what becomes of other tensors that changed or are new (biases, norms, a head): refused, left out and listed,
            or told as tensors trained whole.

    Raises:
        FileNotFoundError, ValueError: a checkpoint is not sound; one lacks a tensor, or has it in another shape; nothing
            changed; NaN or infinity in a difference.
    """
    prefix = prefix_of(component)
    with open_weights(base) as before, open_weights(tuned) as after:
        for name in before.entries.keys() - after.entries.keys():
            raise ValueError(f"{tuned}: it lacks the tensor {name}, which the base has")
        changed = [name for name in after.entries if _differs(name, before, after)]
        modules = {
            _module(name): name for name in changed if _is_matrix(name, before, after) and wanted(prefix + _module(name))
        }
        rest = [name for name in changed if _module(name) not in modules or modules[_module(name)] != name]
        if rest and others == "refuse":
            raise ValueError(
                f"{rest[0]} changed as well{f', and {len(rest) - 1} more' if len(rest) > 1 else ''}, and is no weight of a "
                "projection that can be adapted: leave such tensors out, or keep them whole"
            )
        if not modules:
            raise ValueError(f"{tuned}: no weight of a projection differs from {base}")
        shapes = {prefix + module: _shape(after, name) for module, name in modules.items()}

        def read(module: str, _: Tensor | None) -> Tensor:
            name = modules[module.removeprefix(prefix)]
            difference = after.tensor(name).double() - before.tensor(name).double()
            if not torch.isfinite(difference).all():
                raise ValueError(f"{name} holds NaN or infinity")
            return difference.float()

        source = WeightDeltas(shapes, read)
        if others == "whole":
            yield replace(source, whole={prefix + name: after.tensor(name) for name in rest})
        else:
            yield replace(source, left_out={prefix + name: "no weight of a projection" for name in rest})


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _shape(weights: Weights, name: str) -> tuple[int, int]:
    rows, cols = weights.entries[name].shape
    return rows, cols


def _differs(name: str, before: Weights, after: Weights) -> bool:
    if name not in before.entries or before.entries[name].shape != after.entries[name].shape:
        return True
    return not torch.equal(before.tensor(name).double(), after.tensor(name).double())


def _is_matrix(name: str, before: Weights, after: Weights) -> bool:
    return (
        name.endswith(".weight")
        and name in before.entries
        and before.entries[name].shape == after.entries[name].shape
        and len(after.entries[name].shape) == 2
        and {before.entries[name].dtype, after.entries[name].dtype} <= set(_MATRICES)
    )
