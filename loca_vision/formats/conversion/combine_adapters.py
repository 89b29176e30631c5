"""Combine several adapters: spectra of cosines cell by cell and without loss, other updates as the sum of their matrices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loca_vision.formats.adapter_file import (
    Description,
    check_values,
    component_of,
    part_of,
    prefix_of,
    read_description,
)
from loca_vision.formats.conversion.conversion_error import LayerFidelity
from loca_vision.formats.conversion.weight_deltas import WeightDeltas, file_of, is_adapter
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.packed.reading import open_adapter
from loca_vision.formats.save_load import write_adapter
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.loca import LoCAConfig
from loca_vision.methods.spectrum import Spectrum
from loca_vision.version import __version__


@dataclass(frozen=True)
class Spectra:
    """An adapter whose updates are all sums of cosines.

    Args:
        about: the description in its header.
        updates: the updates by projection, with the component of a pipeline in front.
        whole: its whole tensors, by parameter.
    """

    about: Description
    updates: Mapping[str, Spectrum]
    whole: Mapping[str, Tensor]


def read_spectra(path: str | os.PathLike[str]) -> Spectra | None:
    """Read an adapter of this library whose updates are sums of cosines; return None for everything else.

    Raises:
        FileNotFoundError, ValueError: the file does not exist, or is not sound.
    """
    file = file_of(path)
    if file.is_dir() or not is_adapter(file):
        return None
    with open_adapter(file) as opened:
        about = read_description(opened.metadata, opened.entries)
        tensors = opened.tensors()
        check_values(tensors, about)
    updates = {}
    for name, shape in about.shapes.items():
        component = component_of(name, about.configs)
        own = name.removeprefix(prefix_of(component))
        update = about.configs[component].from_tensors(own, shape, part_of(tensors, component))
        if type(update) is not Spectrum:
            return None
        updates[name] = update
    return Spectra(about, updates, {name: tensors[f"full.{name}"] for name in about.whole})


@torch.no_grad()
def combine_spectra(
    sources: Sequence[tuple[Spectra, float]],
    path: str | os.PathLike[str],
    name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> list[LayerFidelity]:
    """Write the LoCA adapter of scale 1 whose update is the sum of strength times each, with the cells of all, without loss.

    Args:
        dtype: the dtype of the coefficients in the file, as in `save_adapter`; less than float32 rounds the sums.

    Raises:
        ValueError: a projection has different shapes, a whole tensor has different values, only some of the adapters are for a
            pipeline, or a sum is not finite.
        OSError: as `write_adapter`.
    """
    _check_kinds([source.about for source, _ in sources])
    tensors: dict[str, Tensor] = {}
    losses, shapes = [], _shapes([source.about.shapes for source, _ in sources])
    for projection, shape in shapes.items():
        there = [(source.updates[projection], strength) for source, strength in sources if projection in source.updates]
        cells, values = _summed(there, shape)
        if not torch.isfinite(values).all():
            raise ValueError(f"{projection}: combined, its coefficients are not finite in float32")
        tensors |= {f"{projection}.coefficients": values, f"{projection}.locations": cells.to(torch.int32)}
        losses.append(LayerFidelity(projection, shape, len(cells), float(values.double().norm()), 0.0))
    whole = _whole([source.whole for source, _ in sources])
    abouts = [source.about for source, _ in sources]
    configs: dict[str, AdapterConfig] = {
        component: _config(component, abouts, losses) for about in abouts for component in about.configs
    }
    base_model = base_of([about.base_model for about in abouts])
    convolutions = frozenset[str]().union(*(about.convolutions for about in abouts))
    about = Description(configs, shapes, tuple(sorted(whole)), name, base_model, __version__, convolutions)
    tensors |= {f"full.{key}": value for key, value in whole.items()}
    write_adapter(file_of(path, new=True), about, tensors, dtype)
    return losses


def combined(sources: Sequence[tuple[WeightDeltas, float]]) -> WeightDeltas:
    """Return the sum of strength times each update, by module; factors stay factors.

    Raises:
        ValueError: an update depends on the weight (DoRA) or is not a matrix, or shapes or whole tensors do not agree.
    """
    for source, _ in sources:
        for module in source.needs_weight:
            raise ValueError(f"{module}: its update (DoRA) depends on the weight; merge one after the other instead")
        for parameter in source.differences:
            raise ValueError(f"{parameter}: its update is not one of a matrix; merge one after the other instead")

    def read(module: str, _: Tensor | None) -> Tensor | LowRankPair:
        there = [(source.read(module, None), strength) for source, strength in sources if module in source.shapes]
        pairs = [(made, strength) for made, strength in there if isinstance(made, LowRankPair)]
        if len(pairs) == len(there):
            return _joined(pairs)
        matrices = [strength * (made.delta() if isinstance(made, LowRankPair) else made) for made, strength in there]
        return torch.stack(matrices).sum(0)

    return WeightDeltas(
        _shapes([source.shapes for source, _ in sources]),
        read,
        _whole([source.whole for source, _ in sources]),
        {module: kernel for source, _ in sources for module, kernel in source.kernels.items()},
        left_out={key: why for source, _ in sources for key, why in source.left_out.items()},
        base_model=base_of([source.base_model for source, _ in sources]),
    )


def _joined(pairs: Sequence[tuple[LowRankPair, float]]) -> LowRankPair:
    """Return the sum of low-rank updates by concatenating their factors, in float32 or float64."""
    wide = torch.float64 if any(pair.up.dtype == torch.float64 for pair, _ in pairs) else torch.float32
    downs = [pair.down.to(wide) for pair, _ in pairs]
    ups = [strength * pair.scale * pair.up.to(wide) for pair, strength in pairs]
    return LowRankPair(torch.cat(downs), torch.cat(ups, 1))


def base_of(names: Sequence[str]) -> str:
    """Return the base model that all known names agree on, or "unknown"."""
    known = set(names) - {"unknown"}
    return known.pop() if len(known) == 1 else "unknown"


def _summed(sources: Sequence[tuple[Spectrum, float]], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the flat cells of all spectra, ascending, and the sums of their values: (n,) int64 and float32."""
    flat = torch.cat([update.cells[:, 0] * shape[1] + update.cells[:, 1] for update, _ in sources])
    values = torch.cat([update.coefficients.double() * (update.scale * strength) for update, strength in sources])
    cells, where = torch.unique(flat, return_inverse=True)
    return cells, values.new_zeros(len(cells)).index_add(0, where, values).float()


def _check_kinds(abouts: Sequence[Description]) -> None:
    kinds = {"" in about.configs for about in abouts}
    if len(kinds) > 1:
        raise ValueError("some of the adapters are of a pipeline's components, and some of a model by itself")


def _config(component: str, abouts: Sequence[Description], losses: Sequence[LayerFidelity]) -> LoCAConfig:
    prefix = prefix_of(component)
    counts = {loss.layer.removeprefix(prefix): loss.kept for loss in losses if loss.layer.startswith(prefix)}
    targets = dict.fromkeys(part for about in abouts if component in about.configs for part in about.configs[component].targets)
    same = set(counts.values())
    return LoCAConfig(n_components=same.pop() if len(same) == 1 else counts, targets=tuple(targets))


def _shapes(several: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for shapes in several:
        for name, shape in shapes.items():
            if found.setdefault(name, shape) != shape:
                raise ValueError(f"{name} is {found[name]} in one of the adapters and {shape} in another")
    return found


def _whole(several: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the whole tensors of all. One that two of them have must be equal, since replacements cannot be summed."""
    found: dict[str, Tensor] = {}
    for whole in several:
        for name, tensor in whole.items():
            if name in found and not (found[name].shape == tensor.shape and torch.equal(found[name], tensor)):
                raise ValueError(f"{name} was trained whole in two of the adapters, to different values: only one can be used")
            found[name] = tensor
    return found
