"""Convert any update of weights to an adapter of this library: LoCA, by its largest DCT coefficients, or LoRA.

Both return what is lost: the relative error of every layer and of all together, in the Frobenius norm.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from loca_vision.checks import PARTS
from loca_vision.formats.adapter_file import FILE_NAME as ADAPTER_NAME
from loca_vision.formats.adapter_file import Description, prefix_of
from loca_vision.formats.conversion.conversion_error import LayerFidelity
from loca_vision.formats.conversion.dct_truncation import Budget, components_losing, largest_components
from loca_vision.formats.conversion.projections import Projections, places_of
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair, cut
from loca_vision.formats.save_load import write_adapter
from loca_vision.layers.attention_layouts import part_of_name
from loca_vision.layers.projection_rows import ProjectionRows, projections_of_modules
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
    dtype: torch.dtype = torch.float32,
) -> list[LayerFidelity]:
    """Write the LoCA adapter closest to an update, at scale 1.

    Args:
        places: where the model's projections lie (`projections_in`), for a single model. Without it, the modules are those of
            a pipeline's components. Only projections with an update get into the file.
        base_model: the model that the file says it is for.
        skip: leave out what an adapter cannot hold: modules that are not projections (including larger convolutions), updates
            that depend on the weight, differences of biases and norms.
        dtype: the dtype of the coefficients in the file, as in `save_adapter`.

    Returns:
        What each projection keeps, before it is rounded to `dtype`, and what is left out.

    Raises:
        ValueError: an adapter cannot hold a part of the update, and `skip` is not set; some rows of a module belong to no
            projection; the budget does not fit; or the update is not finite.
        OSError: as `write_adapter`.
    """
    found, dropped = places_of(source, places, skip=skip)
    projections = Projections(source, found)
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

    _write(path, source, found, shapes, tensors, config, (base_model or source.base_model, name or source.name), dtype)
    losses = [LayerFidelity(layer, part.shape, len(part.cells), part.norm, part.error) for layer, part in kept.items()]
    return [*losses, *dropped]


def components_for(share: float, source: WeightDeltas, places: Sequence[ProjectionRows] | None = None) -> int:
    """Return the total number of components with which LoCA loses at most `share` of every projection it can hold."""
    return components_losing(share, Projections(source, places_of(source, places, skip=True)[0]))


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
    """Write the LoRA adapter of this library closest to an update: exact if it has factors and no rank is given.

    An adapter has a single rank, the largest; factors of lower ranks are padded with zeros. The scale is folded into B. The
    parts of a fused projection all have the same A.

    Args:
        rank: the rank of every module, as in `to_lora`; the other arguments are as in `to_loca`.

    Raises:
        ValueError, OSError: as `to_loca` and `to_lora`.
    """
    there, dropped = places_of(source, places, skip=skip)
    modules = list(dict.fromkeys(place.module for place in there))
    kept = {module: cut(module, source.read(module, None), rank) for module in modules}
    r = max(one.pair.rank for one in kept.values())
    tensors: dict[str, Tensor] = {}
    for place in there:
        up, down = _factors(place, kept[place.module].pair, r)
        tensors |= {f"{place.projection}.up": up, f"{place.projection}.down": down}
    shapes = {
        place.projection: (len(tensors[f"{place.projection}.up"]), tensors[f"{place.projection}.down"].shape[1])
        for place in there
    }

    def config(component: str, targets: tuple[str, ...]) -> LoRAConfig:
        return LoRAConfig(r=r, alpha=float(r), targets=targets)

    _write(path, source, there, shapes, tensors, config, (base_model or source.base_model, name or source.name))
    return [
        *(
            LayerFidelity(module, source.shapes[module], one.pair.rank, one.norm, one.error, squares=one.squares)
            for module, one in kept.items()
        ),
        *dropped,
    ]


def _factors(place: ProjectionRows, pair: LowRankPair, rank: int) -> tuple[Tensor, Tensor]:
    """Return B (p, rank), which includes the scale, and A (rank, q), in float32."""
    more = rank - pair.rank
    up, down = place.taken(pair.up.float() * pair.scale), pair.down.float()
    return F.pad(up, (0, more)), F.pad(down, (0, 0, 0, more))


def _write(
    path: str | os.PathLike[str],
    source: WeightDeltas,
    places: Sequence[ProjectionRows],
    shapes: Mapping[str, tuple[int, int]],
    tensors: Mapping[str, Tensor],
    config: Callable[[str, tuple[str, ...]], AdapterConfig],
    names: tuple[str, str],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write one adapter file; `config` makes the settings of each component, given the parts it adapts."""
    of_pipeline = bool(projections_of_modules(source.shapes))
    kinds: dict[str, set[str]] = {}
    for place in places:
        component = place.projection.partition(".")[0] if of_pipeline else ""
        kinds.setdefault(component, set()).add(part_of_name(place.projection))
    configs = {component: config(component, tuple(p for p in PARTS if p in of)) for component, of in kinds.items()}
    base_model, name = names
    convolutions = frozenset(place.projection for place in places if place.module in source.kernels)
    about = Description(configs, dict(shapes), tuple(sorted(source.whole)), name, base_model, __version__, convolutions)
    whole = {f"full.{key}": value.contiguous() for key, value in source.whole.items()}
    write_adapter(_file_of_adapter(path), about, whole | {key: value.contiguous() for key, value in tensors.items()}, dtype)


def _file_of_adapter(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    return file if file.suffix == ".safetensors" and not file.is_dir() else file / ADAPTER_NAME
