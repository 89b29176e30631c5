"""Match the updates of modules to the projections of an adapter, and list what an adapter cannot hold."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from loca_vision.formats.conversion.conversion_error import LayerFidelity, left_out_entirely
from loca_vision.formats.conversion.to_lora_file import norm_of, refuse_unless
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.formats.lora_files.keys import canonical
from loca_vision.layers.projection_rows import ProjectionRows, projections_of_modules
from loca_vision.messages import nearest


class Projections(Mapping[str, Tensor]):
    """The update of each projection, computed on access."""

    def __init__(self, source: WeightDeltas, places: Sequence[ProjectionRows]) -> None:
        self.source = source
        self.places = {place.projection: place for place in places}

    def __getitem__(self, projection: str) -> Tensor:
        place = self.places[projection]
        return place.taken(self.source.matrix(place.module))

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def places_of(
    source: WeightDeltas, places: Sequence[ProjectionRows] | None, *, skip: bool
) -> tuple[list[ProjectionRows], list[LayerFidelity]]:
    """Return where the projections that this source updates lie, and which parts of it are not projections.

    Parts of a fused projection whose update is zero are left out, such as the key if only query and value are adapted.

    Args:
        places: where the model's projections lie; None for the components of a pipeline, whose names tell. A text encoder's
            names then contain `text_model`, as in all files, whatever the installed transformers uses.

    Raises:
        ValueError: something is not a projection and `skip` is not set; nothing is a projection; or an update has another
            shape than the model's weight, or rows that belong to no projection.
    """
    by_module: dict[str, list[ProjectionRows]] = {}
    if places is None:
        for module, place in projections_of_modules(source.shapes).items():
            by_module[module] = [replace(place, projection=canonical(place.projection))]
    else:
        for place in places:
            by_module.setdefault(place.module, []).append(place)
    dropped = _without_room(source, by_module)
    refuse_unless(skip, dropped)
    gone = {loss.layer for loss in dropped}
    kept = {module: by_module[module] for module in source.shapes if module not in gone}
    for module, there in kept.items():
        _check_rows(module, source.shapes[module], there)
    if not source.shapes:
        raise ValueError("there is no update of a matrix in it; what is added to biases and norms can be merged")
    if not kept:
        first = next(iter(source.shapes))
        raise ValueError(f"no module of the update is a projection that LoCA adapts; the first is {first}")
    return [place for module, there in kept.items() for place in _that_change(source, module, there)], dropped


def _that_change(source: WeightDeltas, module: str, places: list[ProjectionRows]) -> list[ProjectionRows]:
    """Leave out the parts that are zero, unless all of them are."""
    if len(places) == 1:
        return places
    delta = source.matrix(module)
    return [place for place in places if place.taken(delta).any()] or places


def _without_room(source: WeightDeltas, known: Mapping[str, list[ProjectionRows]]) -> list[LayerFidelity]:
    dropped = []
    for module, shape in source.shapes.items():
        why = _why_not(source, module, known)
        if why:
            norm = math.nan if module in source.needs_weight else norm_of(source.matrix(module))
            dropped.append(left_out_entirely(module, shape, norm, why))
    why = "it is the difference of a parameter that is not a matrix, for which an adapter has no room"
    return dropped + [
        left_out_entirely(name, tuple(tensor.shape), norm_of(tensor), why) for name, tensor in source.differences.items()
    ]


def _why_not(source: WeightDeltas, module: str, known: Mapping[str, list[ProjectionRows]]) -> str:
    """Return why a module cannot be adapted, or "" if it can."""
    kernel = source.kernels.get(module, (1, 1))
    if kernel != (1, 1):
        return f"a convolution of {kernel[0]} x {kernel[1]} is not a projection that LoCA adapts"
    if not known.get(module):
        return f"it is not a projection that LoCA adapts{nearest(module, known)}"
    if module in source.needs_weight:
        return "its update (DoRA) depends on the weight; name the weights (--base), or merge it into them"
    return ""


def _check_rows(module: str, shape: tuple[int, int], there: Sequence[ProjectionRows]) -> None:
    for place in there:
        if place.size is not None and place.size != shape:
            raise ValueError(f"{module} is {place.size} in the model, and its update {shape}")
    if sum(place.count(shape[0]) for place in there) != shape[0]:
        raise ValueError(f"{module}: some of its rows belong to no projection, and their update would be lost")
