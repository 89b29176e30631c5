"""From any update of weights to a LoCA adapter, by its largest DCT coefficients, or to a LoRA, by its largest singular values.

Each says what it loses: the relative error of every layer and of all together, in the Frobenius norm.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from loca_vision.adapter_file import FILE_NAME as ADAPTER_NAME
from loca_vision.adapter_file import Description, nearest, prefix_of
from loca_vision.approximation import Budget, Components, largest_components
from loca_vision.checkpoint import write_adapter
from loca_vision.config import PARTS
from loca_vision.exchange_source import Source
from loca_vision.factors import LowRankPair, truncated
from loca_vision.kinds import AdapterConfig
from loca_vision.loca import LoCAConfig
from loca_vision.lora_writing import write_diffusers_lora, write_kohya_lora, write_peft_lora
from loca_vision.places import Place, places_of_modules
from loca_vision.projections import kind_of
from loca_vision.tables import aligned
from loca_vision.version import __version__

Layout = Literal["diffusers", "kohya", "peft"]


@dataclass(frozen=True)
class Loss:
    """What one layer keeps of its update.

    Args:
        layer: the projection, or the module.
        shape: (p, q).
        kept: components, or the rank.
        norm, error: Frobenius norms of the update and of what is lost of it.
    """

    layer: str
    shape: tuple[int, int]
    kept: int
    norm: float
    error: float

    @property
    def relative(self) -> float:
        return self.error / self.norm if self.norm else 0.0


def total_loss(losses: Sequence[Loss]) -> float:
    """The relative error of all layers together."""
    norm = math.hypot(*(loss.norm for loss in losses))
    return math.hypot(*(loss.error for loss in losses)) / norm if norm else 0.0


def loss_table(losses: Sequence[Loss], unit: str) -> str:
    """A line for each layer, and one for all: shape, what is kept (`unit`), norm of the update, relative error."""
    rows = [("layer", "shape", unit, "norm", "relative error")]
    for loss in losses:
        rows.append(
            (loss.layer, f"{loss.shape[0]} x {loss.shape[1]}", str(loss.kept), f"{loss.norm:.4g}", f"{loss.relative:.4g}")
        )
    norm = math.hypot(*(loss.norm for loss in losses))
    rows.append(("all", "", str(sum(loss.kept for loss in losses)), f"{norm:.4g}", f"{total_loss(losses):.4g}"))
    return aligned(rows, str.ljust)


# To LoCA


def to_loca(
    source: Source,
    budget: Budget,
    path: str | os.PathLike[str],
    *,
    places: Sequence[Place] | None = None,
    base_model: str | None = None,
    name: str | None = None,
    skip: bool = False,
) -> list[Loss]:
    """Write the LoCA adapter closest to an update, at scale 1.

    Args:
        places: of the model's projections (`places_in`), for a model by itself. Projections of the same parts that have no
            update get one of zeros, for a file names all of them. Without, the modules are those of a pipeline's components.
        base_model: what the file says it is for.
        skip: leave out modules that are no projection which LoCA adapts.

    Raises:
        ValueError: such a module is there, or a module of which rows belong to no projection; the budget does not fit; the
            update is not finite.
        OSError: as `write_adapter`.
    """
    projections = _Projections(source, _places(source, places, skip=skip))
    kept = largest_components(projections, budget)
    about, tensors = _adapter(kept, source, base_model or source.base_model, name or source.name)
    write_adapter(_file_of_adapter(path), about, tensors)
    return [Loss(layer, part.shape, len(part.cells), part.norm, part.error) for layer, part in kept.items()]


class _Projections(Mapping[str, Tensor]):
    """The update of each projection, made when asked for."""

    def __init__(self, source: Source, places: Sequence[Place]) -> None:
        self.source = source
        self.places = {place.projection: place for place in places}

    def __getitem__(self, projection: str) -> Tensor:
        place = self.places[projection]
        if place.module in self.source.shapes:
            return place.taken(self.source.matrix(place.module))
        assert place.size is not None
        return torch.zeros(place.count(place.size[0]), place.size[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _places(source: Source, places: Sequence[Place] | None, *, skip: bool) -> list[Place]:
    """Where the projections of an adapter of this source lie: those it updates, and the others of the same parts."""
    if places is None:
        by_module = {module: [_named_as_in_model(place)] for module, place in places_of_modules(source.shapes).items()}
    else:
        by_module = {}
        for place in places:
            by_module.setdefault(place.module, []).append(place)
    for module, shape in source.shapes.items():
        _check_module(module, shape, by_module.get(module, []), by_module, skip=skip)
    found = [place for module in source.shapes for place in by_module.get(module, [])]
    if not found:
        raise ValueError("no module of the update is a projection that LoCA adapts")
    if places is None:
        return found
    parts = {_part(place) for place in found}
    return [place for place in places if _part(place) in parts]


def _check_module(
    module: str, shape: tuple[int, int], there: Sequence[Place], known: Mapping[str, object], *, skip: bool
) -> None:
    if not there:
        if not skip:
            raise ValueError(f"{module} is no projection that LoCA adapts{nearest(module, known)}; it can be left out (skip)")
        return
    for place in there:
        if place.size is not None and place.size != shape:
            raise ValueError(f"{module} is {place.size} in the model, and its update {shape}")
    if sum(place.count(shape[0]) for place in there) != shape[0]:
        raise ValueError(f"{module}: some of its rows belong to no projection, and their update would be lost")


def _part(place: Place) -> str:
    return kind_of(place.projection.rpartition(".")[2])


def _named_as_in_model(place: Place) -> Place:
    """With a text encoder's path as the installed transformers has it: newer ones do without `text_model` in some."""
    component, _, rest = place.projection.partition(".")
    if not rest.startswith("text_model.") or not _is_flat(component):
        return place
    return Place(f"{component}.{rest.removeprefix('text_model.')}", place.module)


def _is_flat(component: str) -> bool:
    if component != "text_encoder":  # those with a projection behind have kept it
        return False
    try:
        from transformers import CLIPTextConfig, CLIPTextModel
    except ImportError:
        return False
    sizes = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    words = {"vocab_size": 3, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    with torch.device("meta"):
        return not hasattr(CLIPTextModel(CLIPTextConfig(**sizes, **words)), "text_model")


def _adapter(
    kept: Mapping[str, Components], source: Source, base_model: str, name: str
) -> tuple[Description, dict[str, Tensor]]:
    counts: dict[str, dict[str, int]] = {}
    tensors: dict[str, Tensor] = {f"full.{key}": value.contiguous() for key, value in source.whole.items()}
    components = {module.partition(".")[0] for module in source.shapes} if places_of_modules(source.shapes) else {""}
    for projection, part in kept.items():
        if math.prod(part.shape) > 2**31:
            raise ValueError(f"{projection}: {part.shape[0]} x {part.shape[1]} cells are more than int32 locations can number")
        component = "" if "" in components else projection.partition(".")[0]
        counts.setdefault(component, {})[projection[len(prefix_of(component)) :]] = len(part.cells)
        tensors |= {f"{projection}.coefficients": part.coefficients, f"{projection}.locations": part.cells.to(torch.int32)}
    configs: dict[str, AdapterConfig] = {component: _config(of) for component, of in counts.items()}
    shapes = {projection: part.shape for projection, part in kept.items()}
    return Description(configs, shapes, tuple(sorted(source.whole)), name, base_model, __version__), tensors


def _config(counts: Mapping[str, int]) -> LoCAConfig:
    kinds = {kind_of(projection.rpartition(".")[2]) for projection in counts}
    same = set(counts.values())
    return LoCAConfig(
        n_components=same.pop() if len(same) == 1 else counts, targets=tuple(part for part in PARTS if part in kinds)
    )


def _file_of_adapter(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    return file if file.suffix == ".safetensors" and not file.is_dir() else file / ADAPTER_NAME


# To LoRA


def to_lora(
    source: Source,
    path: str | os.PathLike[str],
    *,
    layout: Layout,
    rank: int | None = None,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
    skip: bool = False,
) -> list[Loss]:
    """Write the LoRA of some rank closest to an update.

    Args:
        layout: the keys: "diffusers" or "kohya" for a pipeline's components, or "peft", a folder for one model.
        rank: of every module, or, where that is larger, the one that loses nothing; None keeps the factors that there are.
        dtype: of the factors.
        skip: leave out tensors trained whole, which only "peft" has room for.

    Raises:
        ValueError: a rank below 1; None where the update has no factors; whole tensors; modules without a name in this layout.
        OSError: as `write_atomically`.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank={rank}: it is a whole number from 1 up")
    if source.whole and layout != "peft" and not skip:
        first = next(iter(source.whole))
        raise ValueError(f"{first} was trained whole, for which {layout} keys have no room; it can be left out (skip)")
    pairs, losses = {}, []
    for module, shape in source.shapes.items():
        pairs[module], loss = _pair(module, source.read(module, None), shape, rank)
        losses.append(loss)
    if layout == "peft":
        names, whole = _without_component(pairs, source.whole)
        write_peft_lora(path, names, whole=whole, base_model=base_model, overwrite=overwrite)
    else:
        (write_diffusers_lora if layout == "diffusers" else write_kohya_lora)(path, pairs, dtype=dtype)
    return losses


def _pair(module: str, update: Tensor | LowRankPair, shape: tuple[int, int], rank: int | None) -> tuple[LowRankPair, Loss]:
    if rank is None or (isinstance(update, LowRankPair) and update.rank <= rank):
        if not isinstance(update, LowRankPair):
            raise ValueError(f"{module}: its update has no factors yet; say which rank they are to have")
        return update, Loss(module, shape, update.rank, truncated(update, 1).norm, 0.0)
    cut = truncated(update, min(rank, *shape))
    return cut.pair, Loss(module, shape, cut.pair.rank, cut.norm, cut.error)


def _without_component(
    pairs: Mapping[str, LowRankPair], whole: Mapping[str, Tensor]
) -> tuple[dict[str, LowRankPair], dict[str, Tensor]]:
    """By the names of one model: peft's files are for one."""
    if not places_of_modules(pairs):
        return dict(pairs), dict(whole)
    components = {module.partition(".")[0] for module in pairs}
    if len(components) > 1:
        raise ValueError(f"peft's files are for one model, and this update is for {', '.join(sorted(components))}")
    prefix = prefix_of(components.pop())
    return {m[len(prefix) :]: pair for m, pair in pairs.items()}, {name[len(prefix) :]: t for name, t in whole.items()}
