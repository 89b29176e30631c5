"""Weights in, weights out: an adapter folded into a checkpoint, a tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from loca_vision.formats.conversion.weight_deltas import WeightDeltas
from loca_vision.storage.safetensors_file import Entry
from loca_vision.storage.sharded_weights import Weights, open_weights, write_weights_files

_FLOATS = ("F64", "F32", "F16", "BF16")


def merge(
    base: str | os.PathLike[str],
    source: WeightDeltas,
    output: str | os.PathLike[str],
    *,
    component: str = "",
    strength: float = 1.0,
    shard_size: int = 5 * 10**9,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint with W + strength * Delta W, rounded once to W's dtype, where there is an update.

    Whole tensors take the place of the base's; all other tensors are as they were, bit for bit. A folder gets the base's
    `config.json` as well, where it has one.

    Args:
        base: as `open_weights` takes it.
        component: of the pipeline that the base is, for an update of several.
        output, shard_size, overwrite: as in `write_weights_files`.

    Returns:
        What was written.

    Raises:
        ValueError: an update of a weight that the base has not, or not in that shape; a merged weight that is not finite.
        FileExistsError, OSError: as `write_weights_files`.
    """
    target, folder = Path(output), Path(base) if Path(base).is_dir() else Path(base).parent
    if target.exists() and target.resolve() in (Path(base).resolve(), *Path(base).resolve().parents):
        raise ValueError(f"{target}: the base itself is not overwritten")
    with open_weights(base) as weights:
        modules = _modules(source, component, weights)
        whole = {name: tensor for name, tensor in _of_component(source.whole, component).items()}
        for name, tensor in whole.items():
            if name not in weights.entries or weights.entries[name].shape != tuple(tensor.shape):
                raise ValueError(
                    f"{base}: it has no tensor {name} of shape {tuple(tensor.shape)}, which the adapter brings whole"
                )

        def made(name: str) -> Tensor:
            if name in whole:
                return whole[name].to(weights.tensor(name).dtype)
            weight = weights.tensor(name)
            return _merged(name, weight, source, modules[name], strength) if name in modules else weight

        config = folder / "config.json"
        single = target.suffix == ".safetensors" and not target.is_dir()
        extra = {"config.json": config.read_bytes()} if config.is_file() and not single else {}
        stem = _stem(next(iter(weights.files.values())).path)
        return write_weights_files(
            target, weights.entries, made, stem=stem, shard_size=shard_size, extra=extra, overwrite=overwrite
        )


def _of_component(named: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    if not component:
        return dict(named)
    return {name[len(component) + 1 :]: value for name, value in named.items() if name.startswith(f"{component}.")}


def _modules(source: WeightDeltas, component: str, weights: Weights) -> dict[str, str]:
    """The modules of the update by the names of their weights in the base."""
    found: dict[str, str] = {}
    for module, shape in source.shapes.items():
        if component and not module.startswith(f"{component}."):
            continue
        own = module[len(component) + 1 :] if component else module
        # Of a text encoder, files have text_model in its names or not.
        names = [f"{own}.weight", f"{own.removeprefix('text_model.')}.weight"]
        name = next((name for name in names if name in weights.entries), None)
        if name is None:
            raise ValueError(f"the base has no tensor {names[0]}, for which there is an update")
        entry = weights.entries[name]
        if entry.dtype not in _FLOATS or _matrix_of(entry) != shape:
            raise ValueError(f"{name} is {entry.dtype} {entry.shape} in the base, and its update {shape}")
        found[name] = module
    if not found:
        raise ValueError(f"there is no update for the component {component!r}")
    return found


def _matrix_of(entry: Entry) -> tuple[int, ...]:
    """A convolution of 1 x 1 is a matrix."""
    return entry.shape[:2] if entry.shape[2:] in ((), (1, 1)) else entry.shape


def _merged(name: str, weight: Tensor, source: WeightDeltas, module: str, strength: float) -> Tensor:
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    delta = source.matrix(module, wide.flatten(1)).view(wide.shape)
    merged = (wide + strength * delta).to(weight.dtype)
    if not torch.isfinite(merged).all():
        raise ValueError(f"{name}: merged, the weight would not be finite in {weight.dtype}")
    return merged


def _stem(file: Path) -> str:
    """`model` of `model-00001-of-00002.safetensors`."""
    name = file.name.removesuffix(".safetensors")
    head, _, last = name.rpartition("-of-")
    return head.rpartition("-")[0] if last.isdigit() and head else name
