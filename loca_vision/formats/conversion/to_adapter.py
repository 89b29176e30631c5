"""From any update of weights to an adapter of this library: LoCA, by its largest DCT coefficients, or LoRA.

Each says what it loses: the relative error of every layer and of all together, in the Frobenius norm.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from loca_vision.checks import PARTS
from loca_vision.formats.adapter_file import FILE_NAME as ADAPTER_NAME
from loca_vision.formats.adapter_file import Description, prefix_of
from loca_vision.formats.conversion.conversion_error import LayerFidelity, left_out_entirely
from loca_vision.formats.conversion.dct_truncation import Budget, largest_components
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.formats.low_rank_pair import LowRankPair, cut
from loca_vision.formats.save_load import write_adapter
from loca_vision.layers.attention_layouts import target_of
from loca_vision.layers.projection_rows import ProjectionRows, projections_of_modules
from loca_vision.messages import nearest
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.loca import LoCAConfig
from loca_vision.methods.lora import LoRAConfig
from loca_vision.version import __version__


def to_loca(
    source: WeightDeltas,
    budget: Budget,
    path: str | os.PathLike[str],
    *,
    places: Sequence[ProjectionRows] | None = None,
    base_model: str | None = None,
    name: str | None = None,
    skip: bool = False,
) -> list[LayerFidelity]:
    """Write the LoCA adapter closest to an update, at scale 1.

    Args:
        places: of the model's projections (`projections_in`), for a model by itself. Projections of the same parts that have no
            update get one of zeros, for a file names all of them. Without, the modules are those of a pipeline's components.
        base_model: what the file says it is for.
        skip: leave out modules that are no projection which LoCA adapts.

    Raises:
        ValueError: such a module is there, or a module of which rows belong to no projection; the budget does not fit; the
            update is not finite.
        OSError: as `write_adapter`.
    """
    projections = _Projections(source, _that_change(source, _places(source, places, skip=skip)))
    kept = largest_components(projections, budget)
    tensors: dict[str, Tensor] = {}
    for projection, part in kept.items():
        if math.prod(part.shape) > 2**31:
            raise ValueError(f"{projection}: {part.shape[0]} x {part.shape[1]} cells are more than int32 locations can number")
        tensors |= {f"{projection}.coefficients": part.coefficients, f"{projection}.locations": part.cells.to(torch.int32)}
    counts = {projection: len(part.cells) for projection, part in kept.items()}
    shapes = {projection: part.shape for projection, part in kept.items()}

    def config(component: str, targets: tuple[str, ...]) -> LoCAConfig:
        prefix = prefix_of(component)
        mine = {name[len(prefix) :]: count for name, count in counts.items() if name.startswith(prefix)}
        same = set(mine.values())
        return LoCAConfig(n_components=same.pop() if len(same) == 1 else mine, targets=targets)

    _write(path, source, shapes, tensors, config, base_model or source.base_model, name or source.name)
    return [LayerFidelity(layer, part.shape, len(part.cells), part.norm, part.error) for layer, part in kept.items()]


def to_lora_adapter(
    source: WeightDeltas,
    path: str | os.PathLike[str],
    *,
    rank: int | None = None,
    places: Sequence[ProjectionRows] | None = None,
    base_model: str | None = None,
    name: str | None = None,
    skip: bool = False,
) -> list[LayerFidelity]:
    """Write the LoRA adapter of this library closest to an update: exact where it has factors and no rank is asked for.

    One adapter has one rank, the largest; factors of lower ranks are filled up with zeros. The scale is folded into B. The
    parts of a fused projection each have the same A.

    Args:
        rank: of every module, as in `to_lora`; the others as in `to_loca`.

    Raises:
        ValueError, OSError: as `to_loca` and `to_lora`.
    """
    there = _that_change(source, _places(source, places, skip=skip))
    modules = [module for module in source.shapes if any(place.module == module for place in there)]
    kept = {module: cut(module, source.read(module, None), rank) for module in modules}
    r = max(one.pair.rank for one in kept.values())
    tensors: dict[str, Tensor] = {}
    for place in there:
        up, down = _factors(place, kept[place.module].pair if place.module in kept else None, r)
        tensors |= {f"{place.projection}.up": up, f"{place.projection}.down": down}
    shapes = {
        place.projection: (len(tensors[f"{place.projection}.up"]), tensors[f"{place.projection}.down"].shape[1])
        for place in there
    }

    def config(component: str, targets: tuple[str, ...]) -> LoRAConfig:
        return LoRAConfig(r=r, alpha=float(r), targets=targets)

    _write(path, source, shapes, tensors, config, base_model or source.base_model, name or source.name)
    return [LayerFidelity(module, source.shapes[module], one.pair.rank, one.norm, one.error) for module, one in kept.items()]


def without_place(source: WeightDeltas, places: Sequence[ProjectionRows] | None = None) -> list[LayerFidelity]:
    """The modules of an update that are no projection, which `skip` leaves out, each as a loss of everything."""
    known = projections_of_modules(source.shapes) if places is None else {place.module for place in places}
    return [
        left_out_entirely(module, shape, float(source.matrix(module).double().norm()))
        for module, shape in source.shapes.items()
        if module not in known
    ]


def _factors(place: ProjectionRows, pair: LowRankPair | None, rank: int) -> tuple[Tensor, Tensor]:
    """B (p, rank) with the scale in it, and A (rank, q), float32; zeros for a projection without an update."""
    if pair is None:
        assert place.size is not None
        return torch.zeros(place.count(place.size[0]), rank), torch.zeros(rank, place.size[1])
    more = rank - pair.rank
    up, down = place.taken(pair.up.float() * pair.scale), pair.down.float()
    return F.pad(up, (0, more)), F.pad(down, (0, 0, 0, more))


def _write(
    path: str | os.PathLike[str],
    source: WeightDeltas,
    shapes: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, Tensor],
    config: Callable[[str, tuple[str, ...]], AdapterConfig],
    base_model: str,
    name: str,
) -> None:
    """One adapter file; `config` makes the settings of each component, given the parts it adapts."""
    of_pipeline = bool(projections_of_modules(source.shapes))
    kinds: dict[str, set[str]] = {}
    for projection in shapes:
        component = projection.partition(".")[0] if of_pipeline else ""
        kinds.setdefault(component, set()).add(target_of(projection.rpartition(".")[2]))
    configs = {component: config(component, tuple(p for p in PARTS if p in of)) for component, of in kinds.items()}
    about = Description(configs, dict(shapes), tuple(sorted(source.whole)), name, base_model, __version__)
    whole = {f"full.{key}": value.contiguous() for key, value in source.whole.items()}
    write_adapter(_file_of_adapter(path), about, whole | {key: value.contiguous() for key, value in tensors.items()})


class _Projections(Mapping[str, Tensor]):
    """The update of each projection, made when asked for."""

    def __init__(self, source: WeightDeltas, places: Sequence[ProjectionRows]) -> None:
        self.source = source
        self.places = {place.projection: place for place in places}

    def __getitem__(self, projection: str) -> Tensor:
        place = self.places[projection]
        if place.module in self.source.shapes:
            return place.taken(self.source.matrix(place.module))
        assert place.size is not None
        return torch.zeros(place.count(place.size[0]), place.size[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _places(source: WeightDeltas, places: Sequence[ProjectionRows] | None, *, skip: bool) -> list[ProjectionRows]:
    """Where the projections of an adapter of this source lie: those it updates, and the others of the same parts."""
    if places is None:
        by_module = {module: [_named_as_in_model(place)] for module, place in projections_of_modules(source.shapes).items()}
    else:
        by_module = {}
        for place in places:
            by_module.setdefault(place.module, []).append(place)
    for module, shape in source.shapes.items():
        _check_module(module, shape, by_module.get(module, []), by_module, skip=skip)
    found = [place for module in source.shapes for place in by_module.get(module, [])]
    if not found:
        first = next(iter(source.shapes))
        raise ValueError(f"no module of the update is a projection that LoCA adapts; the first is {first}")
    if places is None:
        return found
    parts = {_part(place) for place in found}
    return [place for place in places if _part(place) in parts]


def _that_change(source: WeightDeltas, places: list[ProjectionRows]) -> list[ProjectionRows]:
    """Without the parts of fused projections that no layer's update changes, as the key where query and value are adapted."""
    projections = _Projections(source, places)
    changed = {_part(place) for place in places if projections[place.projection].any()}
    return [place for place in places if not changed or _part(place) in changed]


def _check_module(
    module: str, shape: tuple[int, int], there: Sequence[ProjectionRows], known: Mapping[str, object], *, skip: bool
) -> None:
    if not there:
        if not skip:
            raise ValueError(f"{module} is no projection that LoCA adapts{nearest(module, known)}; it can be left out (skip)")
        return
    for place in there:
        if place.size is not None and place.size != shape:
            raise ValueError(f"{module} is {place.size} in the model, and its update {shape}")
    if sum(place.count(shape[0]) for place in there) != shape[0]:
        raise ValueError(f"{module}: some of its rows belong to no projection, and their update would be lost")


def _part(place: ProjectionRows) -> str:
    return target_of(place.projection.rpartition(".")[2])


def _named_as_in_model(place: ProjectionRows) -> ProjectionRows:
    """With a text encoder's path as the installed transformers has it: newer ones do without `text_model` in some."""
    component, _, rest = place.projection.partition(".")
    if not rest.startswith("text_model.") or not _is_flat(component):
        return place
    return ProjectionRows(f"{component}.{rest.removeprefix('text_model.')}", place.module)


def _is_flat(component: str) -> bool:
    if component != "text_encoder":  # those with a projection behind have kept it
        return False
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError:
        return False
    sizes = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    words = {"vocab_size": 3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    with torch.device("meta"):
        return not hasattr(CLIPTextModel(CLIPTextConfig(**sizes, **words)), "text_model")


def _file_of_adapter(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    return file if file.suffix == ".safetensors" and not file.is_dir() else file / ADAPTER_NAME
