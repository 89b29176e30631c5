"""Updates that depend on the weights they are for (DoRA) as plain ones, given those weights."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from loca_vision.formats.conversion.base_tensors import BaseTensors, is_original
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.formats.low_rank_pair import LowRankPair
from loca_vision.storage.safetensors_file import in_sixteen_bits
from loca_vision.storage.sharded_weights import open_weights


@contextmanager
def given_weights(source: WeightDeltas, base: str | os.PathLike[str]) -> Iterator[WeightDeltas]:
    """The same updates, each of which the weights of the base were given to where it needs them.

    Args:
        base: as `open_weights` takes it: of the component that these updates are of, or of the original layout.

    Raises:
        FileNotFoundError, ValueError: the base is not sound, or has not a weight of that size.
    """
    components = sorted({module.partition(".")[0] for module in source.needs_weight} & set(source.components()))
    with open_weights(base) as weights:
        if len(components) > 1 and not is_original(weights.entries):
            raise ValueError(f"{base}: the update needs the weights of {', '.join(components)}, and this has those of one")
        tensors = BaseTensors(weights.entries, components[0] if components else "")
        for module in source.needs_weight:
            target = tensors.find(f"{module}.weight")
            shape = target.shape(weights.entries[target.name]) if target else ()
            if target is None or (shape[0], math.prod(shape[1:])) != source.shapes[module]:
                raise ValueError(f"{base}: it has no weight of {module} of the size {source.shapes[module]}")

        def read(module: str, weight: Tensor | None) -> Tensor | LowRankPair:
            target = tensors.find(f"{module}.weight") if module in source.needs_weight else None
            if target is None:
                return source.read(module, weight)
            return source.read(module, target.taken(in_sixteen_bits(weights.tensor(target.name))).flatten(1))

        yield replace(source, read=read, needs_weight=(), decomposed={})
