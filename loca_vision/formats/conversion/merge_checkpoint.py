"""Merge an adapter into a checkpoint, one tensor at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loca_vision.formats.conversion.base_files import CONFIG, files_beside, with_classes
from loca_vision.formats.conversion.base_tensors import BaseTensors, Target, is_original
from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.storage.safetensors_file import EIGHT_BITS, Entry
from loca_vision.storage.sharded_weights import open_weights, write_weights_files

_FLOATS = ("F64", "F32", "F16", "BF16", *EIGHT_BITS)


@dataclass
class _Changes:
    """The changes to one tensor of the base."""

    updates: list[tuple[str, Target]] = field(default_factory=list)  # module, and where its weight is
    differences: list[tuple[Tensor, Target]] = field(default_factory=list)
    whole: list[tuple[Tensor, Target]] = field(default_factory=list)


def merge(
    base: str | os.PathLike[str],
    source: WeightDeltas,
    output: str | os.PathLike[str],
    *,
    component: str = "",
    strength: float = 1.0,
    shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a checkpoint with W + strength * Delta W, rounded once to W's dtype, where there is an update.

    Whole tensors replace the base's; all other tensors stay as they were, bit for bit. A classifier's head may have another
    number of classes than the base's. An output folder also gets the small files beside the base if it has a `config.json`,
    which then has the new number of classes.

    Args:
        base: what `open_weights` takes, also in the original layout of Stable Diffusion, Flux or SD3, which the output keeps.
        component: the component of a pipeline that the base is, for an update of several; in the original layout, the only
            component to merge.
        output, shard_size, overwrite: as in `write_weights_files`.
        say: called with a line of text about each replaced tensor.

    Returns:
        The path that was written.

    Raises:
        ValueError: the base lacks a weight that has an update, or has it in another shape; the update is for several
            components and the one that the base is was not named; or a merged weight is not finite.
        FileExistsError, OSError: as `write_weights_files`.
    """
    target = Path(output)
    if target.exists() and target.resolve() in (Path(base).resolve(), *Path(base).resolve().parents):
        raise ValueError(f"{target}: the base itself is not overwritten")
    with open_weights(base) as weights:
        there, wanted = _component(source, component, is_original(weights.entries))
        changes = _changes(source, BaseTensors(weights.entries, there), wanted)
        entries = _entries(weights.entries, changes, say)

        def made(name: str) -> Tensor:
            weight = weights.tensor(name)
            return _merged(name, weight, source, changes[name], strength) if name in changes else weight

        single = target.suffix == ".safetensors" and not target.is_dir()
        extra = {} if single else _extra(Path(base), weights.entries, entries)
        stem = _stem(next(iter(weights.files.values())).path)
        return write_weights_files(target, entries, made, stem=stem, shard_size=shard_size, extra=extra, overwrite=overwrite)


def _component(source: WeightDeltas, component: str, original: bool) -> tuple[str, str]:
    """Return the component that the base is ("" for none or several) and the one to merge ("" for all)."""
    if component and component not in source.components():
        raise ValueError(f"there is no update for the component {component!r}")
    if original:
        return "", component
    there = source.components()
    if len(there) > 1 and not component:
        raise ValueError(f"the adapter is for {', '.join(there)}: say which of them the base is with --component")
    return (component or (there[0] if there else ""),) * 2


def _changes(source: WeightDeltas, base: BaseTensors, component: str) -> dict[str, _Changes]:
    """Return the changes to each tensor of the base, after checking every shape."""
    found: dict[str, _Changes] = {}
    for module in _of_component(source.shapes, component):
        target = _found(base, f"{module}.weight", "for which there is an update")
        _check_update(module, source, target, base.entries[target.name])
        _check_not_scaled(target.name, base.entries)
        change = found.setdefault(target.name, _Changes())
        if target.rows is None and change.updates:
            raise ValueError(f"{target.name} has two updates, of {change.updates[0][0]} and {module}, which are one module")
        change.updates.append((module, target))
    for name in _of_component(source.differences, component):
        target = _found(base, name, "to which the update adds")
        _check_shape(name, tuple(source.differences[name].shape), target, base.entries[target.name])
        found.setdefault(target.name, _Changes()).differences.append((source.differences[name], target))
    for name in _of_component(source.whole, component):
        target = _found(base, name, "which the adapter brings whole")
        if not _is_head(tuple(source.whole[name].shape), target, base.entries[target.name]):
            _check_shape(name, tuple(source.whole[name].shape), target, base.entries[target.name])
        found.setdefault(target.name, _Changes()).whole.append((source.whole[name], target))
    return found


def _of_component(named: Iterable[str], component: str) -> list[str]:
    return [name for name in named if not component or name.startswith(f"{component}.")]


def _found(base: BaseTensors, parameter: str, why: str) -> Target:
    target = base.find(parameter)
    if target is None:
        raise ValueError(f"the base has no tensor {parameter}, {why}")
    return target


def _check_update(module: str, source: WeightDeltas, target: Target, entry: Entry) -> None:
    shape, kernel = target.shape(entry), source.kernels.get(module)
    same_kernel = kernel is None or shape[2:] == kernel or (kernel == (1, 1) and not shape[2:])
    flat = (shape[0], math.prod(shape[1:])) if len(shape) in (2, 4) else ()
    if entry.dtype not in _FLOATS or flat != source.shapes[module] or not same_kernel:
        of = f", of a kernel of {kernel[0]} x {kernel[1]}" if kernel else ""
        raise ValueError(f"{target.name} is {entry.dtype} {shape} in the base, and its update {source.shapes[module]}{of}")


def _check_not_scaled(name: str, entries: Mapping[str, Entry]) -> None:
    """Refuse a weight stored in eight bits with a scale: it may be a multiple of what the model computes with."""
    if entries[name].dtype not in EIGHT_BITS:
        return
    before = name.removesuffix("weight")
    scale = next((other for other in entries if other.startswith(before) and "scale" in other[len(before) :]), None)
    if scale is not None:
        raise ValueError(f"{name} has a scale of its own in the base, {scale}: merge into weights that are not quantized")


def _check_shape(name: str, shape: tuple[int, ...], target: Target, entry: Entry) -> None:
    if target.shape(entry) != shape or entry.dtype not in _FLOATS:
        raise ValueError(f"{name} is {shape}, and in the base {entry.dtype} {target.shape(entry)}, as {target.name}")


def _is_head(shape: tuple[int, ...], target: Target, entry: Entry) -> bool:
    """Return whether a tensor may replace a linear layer's weight or bias that has another number of classes."""
    whole = target.rows is None and not target.transposed and entry.dtype in _FLOATS
    return whole and len(shape) == len(entry.shape) in (1, 2) and shape[1:] == entry.shape[1:] and shape[0] > 0


def _entries(before: Mapping[str, Entry], changes: Mapping[str, _Changes], say: Callable[[str], None]) -> dict[str, Entry]:
    """Return the output's entries: those of the base, except for heads with another number of classes."""
    after = dict(before)
    for name, change in changes.items():
        shape = tuple(change.whole[0][0].shape) if change.whole and change.whole[0][1].rows is None else before[name].shape
        if shape == before[name].shape:
            continue
        _check_whole_head(name, shape[0], before, changes)
        item = (before[name].end - before[name].start) // max(1, math.prod(before[name].shape))
        after[name] = Entry(before[name].dtype, shape, 0, item * math.prod(shape))
        if name.endswith("weight"):
            say(f"{name.removesuffix('.weight')}: replaced by the adapter's, of {shape[0]} classes for {before[name].shape[0]}")
    return after


def _check_whole_head(name: str, classes: int, before: Mapping[str, Entry], changes: Mapping[str, _Changes]) -> None:
    """Check that weight and bias of a layer change together."""
    layer = name.rpartition(".")[0]
    for other in (f"{layer}.weight", f"{layer}.bias"):
        brought = [len(tensor) for tensor, _ in changes[other].whole] if other in changes else []
        if other in before and brought != [classes]:
            raise ValueError(f"{name} is for {classes} classes, and the adapter does not bring {other} for as many")
    if f"{layer}.weight" not in before:
        raise ValueError(f"{name} has another shape in the base, {before[name].shape}, and is not part of a classifier's head")


def _extra(base: Path, before: Mapping[str, Entry], after: Mapping[str, Entry]) -> dict[str, bytes]:
    """Return the files beside the base, with the new number of classes if the head has one."""
    extra = files_beside(base)
    heads = [name for name in after if name.endswith(".weight") and after[name].shape != before[name].shape]
    for name in heads if CONFIG in extra else ():
        extra[CONFIG] = with_classes(extra[CONFIG], before[name].shape[0], after[name].shape[0])
    return extra


@torch.no_grad()
def _merged(name: str, weight: Tensor, source: WeightDeltas, changes: _Changes, strength: float) -> Tensor:
    head = next((tensor for tensor, target in changes.whole if target.rows is None and not target.transposed), None)
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    wide = weight.to(dtype) if head is None else head.to(dtype, copy=True)
    for tensor, target in changes.whole if head is None else ():
        _seen(wide, target)[_rows(target)] = tensor.to(wide.dtype)
    for module, target in changes.updates:
        part = _seen(wide, target)[_rows(target)]
        delta = source.matrix(module, part.flatten(1))
        _seen(wide, target)[_rows(target)] = part + strength * delta.to(wide.dtype).view(part.shape)
    for tensor, target in changes.differences:
        part = _seen(wide, target)[_rows(target)]
        _seen(wide, target)[_rows(target)] = part + strength * tensor.to(wide.dtype)
    merged = wide.to(weight.dtype)
    beyond = merged.element_size() == 1 and bool((wide.abs() > torch.finfo(weight.dtype).max).any())  # torch would saturate it
    if beyond or not torch.isfinite(merged.float()).all():
        raise ValueError(f"{name}: merged, the weight would not be finite in {weight.dtype}")
    return merged


def _seen(tensor: Tensor, target: Target) -> Tensor:
    return tensor.T if target.transposed else tensor


def _rows(target: Target) -> slice | Tensor:
    return slice(None) if target.rows is None else target.rows


def _stem(file: Path) -> str:
    """Return the stem of a file name, such as `model` for `model-00001-of-00002.safetensors`."""
    name = file.name.removesuffix(".safetensors")
    head, _, last = name.rpartition("-of-")
    return head.rpartition("-")[0] if last.isdigit() and head else name
