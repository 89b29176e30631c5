"""Updates of weights from any source: adapters of every kind, LoRA and related files; read one module at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
from loca_vision.formats.conversion.dora_factors import dora_of
from loca_vision.formats.lora_files.former_names import Spelling
from loca_vision.formats.lora_files.keys import canonical
from loca_vision.formats.lora_files.layer_tensors import LoraFile
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.module_update import ModuleUpdate
from loca_vision.formats.lora_files.reader import read_lora
from loca_vision.formats.packed.reading import open_adapter
from loca_vision.layers.projection_rows import ProjectionRows, rows_of_target
from loca_vision.methods.update import Update
from loca_vision.storage.safetensors_file import open_safetensors

_COMPONENT = re.compile(r"(unet|transformer|transformer_2|text_encoder|text_encoder_[23])\.")


@dataclass(frozen=True)
class WeightDeltas:
    """The updates of a model's or a pipeline's weights.

    Args:
        shapes: (p, q) of the weights that are updated, by module: `unet.mid_block...attn1.to_q`, `blocks.0.attn.qkv`. For a
            convolution q is in_channels * kh * kw, as in `weight.flatten(1)`.
        read: returns the update of a module, as a matrix or as its factors. Updates in `needs_weight` need the weight (p, q).
        whole: tensors trained as a whole, which replace those of the base, by the parameter's name.
        kernels: (kh, kw) of the modules that are convolutions, including (1, 1); the others are linear.
        differences: what to add to parameters other than matrices, such as biases, by name.
        needs_weight: the modules whose update depends on the weight (DoRA).
        decomposed: scale * B A and the magnitudes (p,) of those that are DoRA with a magnitude for each row.
        left_out: what is not included, by key, and why.
        name, base_model: the adapter's name and the model it was trained on.
    """

    shapes: Mapping[str, tuple[int, int]]
    read: Callable[[str, Tensor | None], Tensor | LowRankPair]
    whole: Mapping[str, Tensor] = field(default_factory=dict)
    kernels: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    differences: Mapping[str, Tensor] = field(default_factory=dict)
    needs_weight: Collection[str] = ()
    decomposed: Mapping[str, tuple[LowRankPair, Tensor]] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    name: str = "default"
    base_model: str = "unknown"

    def components(self) -> list[str]:
        """Return the components of a pipeline that this is for."""
        names = (*self.shapes, *self.differences, *self.whole)
        return sorted({name.partition(".")[0] for name in names if _COMPONENT.match(name)})

    def matrix(self, module: str, weight: Tensor | None = None) -> Tensor:
        """Return the update of a module's weight, (p, q) in float32 or float64."""
        update = self.read(module, weight)
        return update.delta() if isinstance(update, LowRankPair) else update


def read_source(
    path: str | os.PathLike[str],
    places: Sequence[ProjectionRows] | None = None,
    *,
    skip: bool = False,
    component: str = "",
    sizes: Mapping[str, tuple[int, int]] | None = None,
) -> WeightDeltas:
    """Read an adapter file of this library, of any kind, or any file that `read_lora` reads.

    Args:
        places: the model's projections (`projections_in`), needed for an adapter of a single model; the names of a
            pipeline's components tell where its projections are.
        skip: as in `read_lora`.
        component: the component of a pipeline, for a LoRA whose names do not tell it.
        sizes: (p, q) of the model's weights by module, if they are known and `places` are not.

    Raises:
        FileNotFoundError, ValueError: the file does not exist, is not sound, or is for projections whose weights are unknown.
    """
    if component and not component.isidentifier():
        raise ValueError(f"component={component!r}: expected one of a pipeline, such as unet, transformer or text_encoder")
    file = file_of(path)
    if file.is_dir() or not is_adapter(file):
        known = {place.module: place.size for place in places or () if place.size is not None}
        return _of_lora(read_lora(file, skip=skip, sizes=known or sizes), component, Spelling(known))
    with open_adapter(file) as opened:
        about = read_description(opened.metadata, opened.entries)
        tensors = opened.tensors()
        check_values(tensors, about)
        return _of_adapter(about, tensors, {place.projection: place for place in places or ()})


def file_of(path: str | os.PathLike[str], *, new: bool = False) -> Path:
    """Return the adapter file that a path means: the path itself, or the file that is in a folder or (`new`) will be."""
    file = Path(path)
    wanted = file.suffix != ".safetensors" or file.is_dir() if new else file.is_dir() and (file / FILE_NAME).exists()
    return file / FILE_NAME if wanted else file


def _of_lora(lora: LoraFile, component: str, spelling: Spelling) -> WeightDeltas:
    """Convert a LoRA file, with the names of a pipeline's modules or, if the model is known, the names it has."""

    def named(name: str) -> str:
        told = not component or _COMPONENT.match(name)
        return name if told else canonical(f"{component}.{name}")

    updates = {spelling.of(named(module)): update for module, update in _without_empty_kinds(lora.updates).items()}
    if len(updates) < len(_without_empty_kinds(lora.updates)):
        raise ValueError("a module comes twice, under names that it had in different versions of transformers")

    there = dict.fromkeys(named(name).partition(".")[0] for name in (*lora.updates, *lora.differences, *lora.whole))
    if component and component not in there:
        raise ValueError(f"component={component!r}: by the names in the file it is for {', '.join(there)}")

    def read(module: str, weight: Tensor | None) -> Tensor | LowRankPair:
        try:
            return updates[module].read(weight)
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from None

    return WeightDeltas(
        {module: update.shape for module, update in updates.items()},
        read,
        {named(name): tensor for name, tensor in lora.whole.items()},
        {module: update.kernel for module, update in updates.items() if update.kernel is not None},
        {spelling.of_parameter(named(name)): tensor for name, tensor in lora.differences.items()},
        {module for module, update in updates.items() if update.needs_weight},
        {module: dora for module, update in updates.items() if (dora := update.decomposed()) is not None},
        lora.skipped,
    )


def _without_empty_kinds(updates: Mapping[str, ModuleUpdate]) -> dict[str, ModuleUpdate]:
    """Leave out projections that are zero in every layer: files with kohya's keys may have one for diffusers' sake."""
    filled = {_kind(module) for module, update in updates.items() if not _is_zero(update)}
    return {module: update for module, update in updates.items() if _kind(module) in filled} or dict(updates)


def _is_zero(update: ModuleUpdate) -> bool:
    """Return whether it is a LoRA of zeros; no program writes zeros of another kind."""
    if update.kind != "LoRA":
        return False
    pair = update.make()
    return isinstance(pair, LowRankPair) and not (pair.up.any() and pair.down.any())


def _kind(module: str) -> tuple[str, str]:
    """Return the component and the name of a projection, which are the same in every layer."""
    return module.partition(".")[0], module.removesuffix(".0").rpartition(".")[2]


def is_adapter(file: Path) -> bool:
    """Return whether a safetensors file says that it is an adapter of this library."""
    with open_safetensors(file, eight_bits=True) as opened:
        return METADATA_KEY in opened.metadata


def _of_adapter(about: Description, tensors: dict[str, Tensor], known: Mapping[str, ProjectionRows]) -> WeightDeltas:
    updates: dict[str, list[tuple[ProjectionRows, Update]]] = {}
    shapes: dict[str, tuple[int, int]] = {}
    kernels: dict[str, tuple[int, int]] = {}
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
            if projection in part.convolutions:
                kernels[place.module] = 1, 1
            update = config.from_tensors(projection, shape, part_of(tensors, component))
            updates.setdefault(place.module, []).append((place, update))

    def read(module: str, weight: Tensor | None) -> Tensor | LowRankPair:
        return _joined(updates[module], shapes[module], weight)

    whole = {name: tensors[f"full.{name}"] for name in about.whole}
    needing = {module for module, there in updates.items() if any(update.needs_weight for _, update in there)}
    decomposed = {module: dora for module in needing if (dora := dora_of(updates[module], shapes[module])) is not None}
    return WeightDeltas(shapes, read, whole, kernels, {}, needing, decomposed, {}, about.name, about.base_model)


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
            raise ValueError(f"{place.projection}: its update (DoRA) depends on the weight, which is not given")
        delta = update.delta(weight=None if weight is None else place.taken(weight))
        if place.rows is None:
            result += delta
        else:
            result[place.rows] += delta
    return result


def _placed(place: ProjectionRows, up: Tensor, rows: int) -> Tensor:
    """Extend a projection's B to the rows of the whole weight; the other rows are zero."""
    whole = up.new_zeros(rows, up.shape[1])
    whole[slice(None) if place.rows is None else place.rows] = up
    return whole
