"""The weights an adapter is for, by the names that updates use: those of one model, or of a pipeline's components."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from loca_vision.formats.conversion.base_tensors import BaseTensors, Target, is_original
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.written_layers import COMPONENTS
from loca_vision.storage.safetensors_file import in_sixteen_bits
from loca_vision.storage.sharded_weights import Weights, open_weights


@dataclass(frozen=True)
class Base:
    """The weights of a model or pipeline.

    Args:
        path: the path of the weights, for error messages.
        opened: for each component, or under "" for all, the checkpoint and where it has the parameters.
    """

    path: str | os.PathLike[str]
    opened: Mapping[str, tuple[Weights, BaseTensors]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter such as `unet.conv_in.weight`, or () if there is none of that name."""
        weights, target = self._find(name)
        return () if target is None else target.shape(weights.entries[target.name])

    def tensor(self, name: str) -> Tensor:
        """Return a parameter.

        Raises:
            ValueError: the base has no such parameter.
        """
        weights, target = self._find(name)
        if target is None:
            component, _, own = name.partition(".")
            named = own if component in COMPONENTS else name
            raise ValueError(f"{self.path}: it has no tensor {named}, for which there is an update")
        return target.taken(in_sixteen_bits(weights.tensor(target.name)))

    def _find(self, name: str) -> tuple[Weights, Target | None]:
        weights, tensors = self.opened.get(name.partition(".")[0]) or self.opened.get("") or next(iter(self.opened.values()))
        return weights, tensors.find(name)


def is_pipeline(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder that contains folders for components."""
    return any((Path(path) / component).is_dir() for component in COMPONENTS)


@contextmanager
def open_base(path: str | os.PathLike[str], names: Iterable[str]) -> Iterator[Base]:
    """Open the weights that an update is for.

    Args:
        path: what `open_weights` takes, for a model or in the original layout; or the folder of a pipeline, with a folder for
            each component.
        names: the names of the parameters or modules that will be requested.

    Raises:
        FileNotFoundError, ValueError: as `open_weights`; or the weights are of one model and `names` of several components.
    """
    components = sorted({name.partition(".")[0] for name in names} & set(COMPONENTS)) or [""]
    folders = {component: Path(path) / component for component in components if component}
    with ExitStack() as stack:
        opened = {}
        if not is_pipeline(path):
            weights = stack.enter_context(open_weights(path))
            original = is_original(weights.entries)
            if len(components) > 1 and not original:
                raise ValueError(f"{path}: it has no folder {components[0]}, and the adapter is for {', '.join(components)}")
            opened[""] = weights, BaseTensors(weights.entries, "" if original else components[0])
        for component, folder in folders.items() if not opened else ():
            if not folder.is_dir():
                raise ValueError(f"{path}: it has no folder {component}, and the adapter is for {', '.join(components)}")
            weights = stack.enter_context(open_weights(folder))
            opened[component] = weights, BaseTensors(weights.entries, component)
        yield Base(path, opened)


@contextmanager
def given_weights(source: WeightDeltas, base: str | os.PathLike[str]) -> Iterator[WeightDeltas]:
    """Return the same updates, with the base's weights supplied to each update that needs them (DoRA).

    Args:
        base: what `open_base` takes.

    Raises:
        FileNotFoundError, ValueError: the base is not sound, or lacks a weight of that size.
    """
    if not source.needs_weight:
        yield source
        return
    with open_base(base, source.needs_weight) as opened:
        for module in source.needs_weight:
            shape = opened.shape(f"{module}.weight")
            if not shape or (shape[0], math.prod(shape[1:])) != source.shapes[module]:
                raise ValueError(f"{base}: it has no weight of {module} of the size {source.shapes[module]}")

        def read(module: str, weight: Tensor | None) -> Tensor | LowRankPair:
            known = opened.tensor(f"{module}.weight").flatten(1) if module in source.needs_weight else weight
            return source.read(module, known)

        yield replace(source, read=read, needs_weight=(), decomposed={})
