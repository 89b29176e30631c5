"""A fully fine-tuned checkpoint minus its base, as an update of weights; by module, one at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from loca_vision.formats.adapter_file import prefix_of
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.storage.sharded_weights import Weights, open_weights

Others = Literal["refuse", "skip", "whole"]
_MATRICES = ("F64", "F32", "F16", "BF16")


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
