"""The difference between a fully fine-tuned checkpoint and its base as an update of weights, read one module at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from loca_vision.formats.conversion.base_tensors import BaseTensors
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.storage.safetensors_file import EIGHT_BITS, in_sixteen_bits
from loca_vision.storage.sharded_weights import Weights, open_weights

Others = Literal["refuse", "skip", "whole"]
_MATRICES = ("F64", "F32", "F16", "BF16", *EIGHT_BITS)


@dataclass(frozen=True)
class _Checkpoint:
    """One of the two checkpoints, with its parameters by the names that updates use."""

    weights: Weights
    base: BaseTensors

    def shape(self, parameter: str) -> tuple[int, ...] | None:
        target = self.base.find(parameter)
        return None if target is None else target.shape(self.weights.entries[target.name])

    def dtype(self, parameter: str) -> str:
        target = self.base.find(parameter)
        return self.weights.entries[target.name].dtype if target else ""

    def tensor(self, parameter: str) -> Tensor:
        """Read a parameter now."""
        target = self.base.find(parameter)
        assert target is not None
        return target.taken(in_sixteen_bits(self.weights.tensor(target.name)))


@contextmanager
def open_difference(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    wanted: Callable[[str], bool],
    *,
    component: str = "",
    others: Others = "refuse",
    modules: Collection[str] = (),
) -> Iterator[WeightDeltas]:
    """Open a fully fine-tuned checkpoint minus its base, as an update of the weights that changed.

    Args:
        base, tuned: what `open_weights` takes; either may be in the original layout of Stable Diffusion, Flux or SD3.
        wanted: returns whether to include an update of that module; its weight must also be a matrix or a convolution's.
        component: the component of a pipeline that both are, which is put before every name; in the original layout, the only
            component to compare.
        others: how to treat other tensors that changed or are new (biases, norms, a head): refuse them, leave them out and
            list them, or include them as tensors trained as a whole.
        modules: the model's module names, if known; they are used whatever transformers called the modules in the files.

    Raises:
        FileNotFoundError, ValueError: a checkpoint is not sound; one lacks a tensor or has it in another shape; nothing
            changed; or a difference holds NaN or infinity.
    """
    with open_weights(base) as weights_before, open_weights(tuned) as weights_after:
        before, after = (_Checkpoint(w, BaseTensors(w.entries, component, modules)) for w in (weights_before, weights_after))
        for name in _parameters(before, component):
            if after.base.find(name) is None:
                raise ValueError(f"{tuned}: it lacks the tensor {_told(name, component)}, which the base has")
        changed = [name for name in _parameters(after, component) if _differs(name, before, after)]
        matrices = {_module(name): name for name in changed if _is_matrix(name, before, after) and wanted(_module(name))}
        rest = [name for name in changed if matrices.get(_module(name)) != name]
        if rest and others == "refuse":
            _refuse(rest, component)
        if not matrices:
            raise ValueError(f"{tuned}: no weight of a projection differs from {base}")
        source = _difference(before, after, matrices)
        if others == "whole":
            yield replace(source, whole={name: after.tensor(name) for name in rest})
        else:
            yield replace(source, left_out=dict.fromkeys(rest, "no weight of a projection"))


def _refuse(rest: list[str], component: str) -> None:
    more = f", and {len(rest) - 1} more" if len(rest) > 1 else ""
    raise ValueError(
        f"{_told(rest[0], component)} changed as well{more}, and is not a weight of a projection that can be adapted: "
        "leave such tensors out, or keep them whole"
    )


def _difference(before: _Checkpoint, after: _Checkpoint, modules: Mapping[str, str]) -> WeightDeltas:
    """Return the difference of these modules, given the names of their weights."""

    def read(module: str, _: Tensor | None) -> Tensor:
        difference = after.tensor(modules[module]).double() - before.tensor(modules[module]).double()
        if not torch.isfinite(difference).all():
            raise ValueError(f"{modules[module]} holds NaN or infinity")
        return difference.float().flatten(1)

    sizes = {module: after.shape(name) or () for module, name in modules.items()}
    shapes = {module: (size[0], math.prod(size[1:])) for module, size in sizes.items()}
    kernels = {module: (size[2], size[3]) for module, size in sizes.items() if len(size) == 4}
    return WeightDeltas(shapes, read, kernels=kernels)


def _parameters(checkpoint: _Checkpoint, component: str) -> list[str]:
    """Return the parameters to compare: in the original layout, those of the component if one is named."""
    names = checkpoint.base.parameters()
    if not (component and checkpoint.base.is_original):
        return names
    return [name for name in names if name.startswith(f"{component}.")]


def _told(name: str, component: str) -> str:
    """Return a parameter's name as the checkpoint of a component has it."""
    return name.removeprefix(f"{component}.") if component else name


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _differs(name: str, before: _Checkpoint, after: _Checkpoint) -> bool:
    if before.shape(name) != after.shape(name):
        return True
    return not torch.equal(before.tensor(name).double(), after.tensor(name).double())


def _is_matrix(name: str, before: _Checkpoint, after: _Checkpoint) -> bool:
    """Return whether it is the weight of a linear layer or a convolution, with the same shape in both."""
    shape = after.shape(name)
    fits = name.endswith(".weight") and shape is not None and len(shape) in (2, 4) and before.shape(name) == shape
    return fits and {before.dtype(name), after.dtype(name)} <= set(_MATRICES)
