"""Selective DCT fine-tuning: learn cosine components where the pretrained weight has its energy (sDCTFT, arXiv 2410.09103)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from loca_vision.checks import check_count, check_share, is_finite
from loca_vision.functional.dct import dct2
from loca_vision.methods.adapter_config import Projection
from loca_vision.methods.locations import cell_locations
from loca_vision.methods.registry import kind
from loca_vision.methods.sparse_config import SparseConfig, fixed
from loca_vision.methods.spectrum import Spectrum

_MOST_BANDS = 1000


@kind
@dataclass(frozen=True)
class SDCTFTConfig(SparseConfig):
    """The settings of selective DCT fine-tuning: W' = W0 + scale * C^T S D, with cells chosen by the spectrum of W0 itself.

    The frequency plane is divided into bands of equal width by the distance sqrt(u^2 + v^2) from the constant component. In
    each band, a share of the components is placed where `|DCT(W0)|` is largest, and the rest at random among the band's other
    cells. The locations stay fixed; the coefficients are learned and start at zero.

    The paper does not say what the outermost distance is. Here it is the largest in the plane, sqrt((p-1)^2 + (q-1)^2).

    Args:
        n_components: the number of non-zero coefficients of each adapted projection, from 1 to p * q, or a mapping from name
            patterns to such counts, as in `LoCAConfig`.
        scale: a factor of the update; every atom has Frobenius norm 1.
        targets: which projections to adapt, as in `AdapterConfig`.
        n_bands: the number of bands, from low to high frequencies.
        energy_share: delta, the share of each band's components that is chosen by energy, from 0 to 1.
        budgets: the share of all components that each band gets; equal shares by default. Components for which a band has no
            cells left go to the next band, from low to high, and from the last band back to the first.
        seed: the seed for the random cells.
        layers: name patterns of the layers to adapt, as in `AdapterConfig`; None: all.

    Raises:
        ValueError: a field is invalid; the message names the field, its value and the rule.
    """

    method: ClassVar[str] = "sdctft"
    title: ClassVar[str] = "sDCTFT"
    summary: ClassVar[str] = "cosine coefficients where the weight has energy"

    n_components: int | Mapping[str, int] = 3000
    scale: float = 1.0
    targets: tuple[str, ...] = ("q", "v")
    n_bands: int = 3
    energy_share: float = 0.7
    budgets: tuple[float, ...] | None = None
    seed: int = 0
    layers: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_bands", self.n_bands, most=_MOST_BANDS)
        check_share("energy_share", self.energy_share)
        _check_budgets(self.budgets, self.n_bands)
        if self.budgets is not None:
            object.__setattr__(self, "budgets", tuple(map(float, self.budgets)))

    def spectrum(self, shape: tuple[int, int], coefficients: Tensor, locations: Tensor) -> Spectrum:
        return fixed(Spectrum(shape, coefficients, locations, scale=self.scale))

    def first_locations(self, projection: Projection, count: int, generator: torch.Generator) -> Tensor:
        energy = dct2(projection.weight().detach().float().cpu()).square().flatten()
        shares = self.budgets or (1 / self.n_bands,) * self.n_bands
        cells = _chosen(energy, bands(projection.shape, self.n_bands), count, shares, self.energy_share, generator)
        return cell_locations(cells, projection.shape)


def bands(shape: tuple[int, int], n_bands: int) -> list[Tensor]:
    """Return the flat cells row * q + column of each band; bands have equal width in distance from the constant component."""
    rows, cols = (torch.arange(size, dtype=torch.float64) for size in shape)
    distance = (rows[:, None].square() + cols.square()).sqrt().flatten()
    band = (distance / distance.max().clamp(min=1) * n_bands).long().clamp(max=n_bands - 1)
    return [torch.nonzero(band == number).flatten() for number in range(n_bands)]


def _chosen(
    energy: Tensor, cells: list[Tensor], count: int, shares: Sequence[float], energy_share: float, generator: torch.Generator
) -> Tensor:
    """Return (count,) distinct flat cells: from each band, those with the most energy, then others at random."""
    found = []
    for band, number in zip(cells, allotted(count, shares, [len(band) for band in cells]), strict=True):
        ranked = band[energy[band].argsort(descending=True, stable=True)]
        best = round(energy_share * number)
        rest = ranked[best:]
        drawn = torch.randperm(len(rest), generator=generator)[: number - best]
        found += [ranked[:best], rest[drawn]]
    return torch.cat(found)


def allotted(count: int, shares: Sequence[float], room: Sequence[int]) -> list[int]:
    """Return how many of `count` each band gets: its share, rounded so that the sum is `count`.

    Whatever a band has no room for goes to the next one, and from the last back to the first.
    """
    ends = [round(count * sum(shares[: i + 1]) / sum(shares)) for i in range(len(shares))]
    wanted = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    given, over = [0] * len(room), 0
    for i in (*range(len(room)), *range(len(room))):
        asked = over + (wanted[i] if given[i] == 0 else 0)
        wanted[i] = 0
        taken = min(asked, room[i] - given[i])
        given[i], over = given[i] + taken, asked - taken
    return given


def _check_budgets(budgets: Any, n_bands: int) -> None:
    if budgets is None:
        return
    numbers = isinstance(budgets, (tuple, list)) and all(is_finite(b) and b >= 0 for b in budgets)
    if not numbers or len(budgets) != n_bands or not sum(budgets) > 0:
        raise ValueError(f"budgets={budgets!r}: {n_bands} shares from 0 up, one for each band, not all 0")
