"""SHiRA: learn a few entries of the weight itself (sparse high-rank adapters, arXiv 2406.13175, NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loca_vision.checks import check_choice
from loca_vision.functional.cosine_atoms import Cells
from loca_vision.functional.patches import Patches, entries
from loca_vision.methods.adapter_config import Projection
from loca_vision.methods.locations import cell_locations
from loca_vision.methods.patch_spectrum import PatchSpectrum
from loca_vision.methods.registry import kind
from loca_vision.methods.sparse_config import SparseConfig, fixed


class SparseEntries(PatchSpectrum):
    """Delta W = scale * S of shape (p, q), where S is zero except for B coefficients."""

    def patches(self, layout: Cells) -> Patches:
        return layout.once(entries)


@kind
@dataclass(frozen=True)
class SHiRAConfig(SparseConfig):
    """The settings of SHiRA: W' = W0 + scale * S, where S is non-zero only at fixed entries of the weight, in no other basis.

    The paper trains 1 to 2 % of the weight. Its random mask and its magnitude mask are implemented here; its gradient-based
    masks are not.

    Args:
        n_components: the number of trained entries of each adapted projection, from 1 to p * q, or a mapping from name
            patterns to such counts, as in `LoCAConfig`. peft's `r` corresponds to r * (p + q).
        scale: a factor of the update.
        targets: which projections to adapt, as in `AdapterConfig`.
        mask: "random" entries, or those with the largest "magnitude" in the pretrained weight (SHiRA-Rand and SHiRA-WM).
        seed: the seed for the random entries.
        layers: name patterns of the layers to adapt, as in `AdapterConfig`; None: all.

    Raises:
        ValueError: a field is invalid; the message names the field, its value and the rule.
    """

    method: ClassVar[str] = "shira"
    title: ClassVar[str] = "SHiRA"
    summary: ClassVar[str] = "few entries of the weight itself"

    n_components: int | Mapping[str, int] = 3000
    scale: float = 1.0
    targets: tuple[str, ...] = ("q", "v")
    mask: Literal["random", "magnitude"] = "random"
    seed: int = 0
    layers: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mask", self.mask, ("random", "magnitude"))

    def spectrum(self, shape: tuple[int, int], coefficients: Tensor, locations: Tensor) -> SparseEntries:
        return fixed(SparseEntries(shape, coefficients, locations, scale=self.scale))

    def first_locations(self, projection: Projection, count: int, generator: torch.Generator) -> Tensor:
        if self.mask == "random":
            return super().first_locations(projection, count, generator)
        sizes = projection.weight().detach().float().cpu().abs().flatten()
        return cell_locations(sizes.argsort(descending=True, stable=True)[:count], projection.shape)
