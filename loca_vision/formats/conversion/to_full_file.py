"""Convert any update of weights to a file that holds all of it, for ComfyUI and A1111: differences with kohya's keys."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from loca_vision.formats.conversion.base_weights import Base, open_base
from loca_vision.formats.conversion.conversion_error import LayerFidelity, left_out_entirely
from loca_vision.formats.conversion.to_lora_file import norm_of, refuse_unless
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.formats.lora_files.kohya_writer import difference_key, write_differences

_NO_NAME = "kohya's keys have no name for it"
_NO_BASE = "name the base's weights with --base"


def to_full(
    source: WeightDeltas,
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    skip: bool = False,
    xl: bool = False,
) -> list[LayerFidelity]:
    """Write the whole update, `.diff` of weights and `.diff_b` of biases, without any loss except rounding.

    Args:
        base: the weights that the update is for, as `open_base` takes them: they are needed to turn a tensor trained as a whole
            into a difference, and for the update of a DoRA, which depends on the weight.
        dtype: the dtype of the differences; by default float32.
        base_model, skip, xl: as in `to_lora`.

    Returns:
        What each layer keeps, including those that are left out.

    Raises:
        FileNotFoundError, ValueError: as `open_base`; or, without `skip`, a parameter has no name in these keys, or cannot be
            written without the base.
        OSError: as `write_atomically`.
    """
    dropped = _without_room(source, with_base=base is not None)
    refuse_unless(skip, dropped)
    kept = _without(source, {loss.layer for loss in dropped})
    tensors: dict[str, Tensor] = {}
    losses: list[LayerFidelity] = []
    needed = [*kept.needs_weight, *kept.whole]
    with open_base(base, needed) if base is not None and needed else nullcontext(None) as weights:
        for layer, parameter, exact, shape in _exact(kept, weights):
            stored = exact.to(dtype or torch.float32)
            lost = norm_of(exact.double() - stored.double())
            losses.append(LayerFidelity(layer, shape, exact.numel(), norm_of(exact), lost))
            tensors[parameter] = stored
    write_differences(path, tensors, kept.shapes, base_model=base_model or source.base_model, xl=xl)
    return [*losses, *dropped]


def _without(source: WeightDeltas, gone: Collection[str]) -> WeightDeltas:
    return replace(
        source,
        shapes={module: shape for module, shape in source.shapes.items() if module not in gone},
        whole={name: tensor for name, tensor in source.whole.items() if name not in gone},
        differences={name: tensor for name, tensor in source.differences.items() if name not in gone},
        needs_weight=[module for module in source.needs_weight if module not in gone],
    )


def _exact(source: WeightDeltas, weights: Base | None) -> Iterator[tuple[str, str, Tensor, tuple[int, ...]]]:
    """Yield each layer, the name of its parameter, the difference in the parameter's shape, and the shape to report."""
    for module, shape in source.shapes.items():
        matrix = _matrix(source, module, weights if module in source.needs_weight else None)
        yield module, f"{module}.weight", _with_kernel(matrix, source.kernels.get(module)), shape
    for name, tensor in source.whole.items():
        yield name, name, _difference(name, tensor, weights), tuple(tensor.shape)
    for name, tensor in source.differences.items():
        yield name, name, tensor, tuple(tensor.shape)


def _matrix(source: WeightDeltas, module: str, weights: Base | None) -> Tensor:
    if weights is None:
        return source.matrix(module)
    weight = weights.tensor(f"{module}.weight").flatten(1)
    if tuple(weight.shape) != source.shapes[module]:
        raise ValueError(f"{module} is {tuple(weight.shape)} in the base, and its update {source.shapes[module]}")
    return source.matrix(module, weight)


def _difference(name: str, tensor: Tensor, weights: Base | None) -> Tensor:
    assert weights is not None
    before = weights.tensor(name)
    if before.shape != tensor.shape:
        raise ValueError(f"{name} is {tuple(before.shape)} in the base, and {tuple(tensor.shape)} in the adapter")
    return tensor.double() - before.double()


def _with_kernel(matrix: Tensor, kernel: tuple[int, int] | None) -> Tensor:
    """Reshape a convolution's (p, in * kh * kw) to (p, in, kh, kw)."""
    return matrix if kernel is None else matrix.reshape(len(matrix), -1, *kernel)


def _without_room(source: WeightDeltas, *, with_base: bool) -> list[LayerFidelity]:
    dropped = []
    for module, shape in source.shapes.items():
        if not _has_key(f"{module}.weight"):
            unknown = module in source.needs_weight
            dropped.append(left_out_entirely(module, shape, math.nan if unknown else norm_of(source.matrix(module)), _NO_NAME))
        elif module in source.needs_weight and not with_base:
            dropped.append(left_out_entirely(module, shape, math.nan, f"its update (DoRA) depends on the weight; {_NO_BASE}"))
    for name, tensor in source.whole.items():
        if not _has_key(name) or not with_base:
            why = f"it was trained whole, and what it adds only the base's tells; {_NO_BASE}" if _has_key(name) else _NO_NAME
            dropped.append(left_out_entirely(name, tuple(tensor.shape), math.nan, why))
    return dropped + [
        left_out_entirely(name, tuple(tensor.shape), norm_of(tensor), _NO_NAME)
        for name, tensor in source.differences.items()
        if not _has_key(name)
    ]


def _has_key(parameter: str) -> bool:
    try:
        return bool(difference_key(parameter, xl=False))
    except ValueError:
        return False
