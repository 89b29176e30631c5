"""Location-aware Cosine Adaptation: learn the coefficients and locations of a cosine spectrum (LoCA, ICLR 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loca_vision.checks import check_choice
from loca_vision.methods.adapter_config import Projection
from loca_vision.methods.registry import kind
from loca_vision.methods.sparse_config import SparseConfig
from loca_vision.methods.spectrum import Spectrum

LOCATION_INITS = ("uniform", "gradient")
LOCATION_GRADIENTS = ("central", "forward", "backward")


@kind
@dataclass(frozen=True)
class LoCAConfig(SparseConfig):
    """The settings of Location-aware Cosine Adaptation (ICLR 2025): W' = W0 + scale * C^T S D.

    Args:
        n_components: the number of non-zero coefficients of each adapted projection, from 1 to p * q; or a mapping from name
            patterns (`"blocks.0.*"`, as in `fnmatch`, matched against names like `blocks.0.attn.q`) to such counts, where the
            first pattern that matches decides.
        scale: alpha. Every atom has Frobenius norm 1, so a scale means the same at every width.
        targets: which projections to adapt, as in `AdapterConfig`.
        location_init: "uniform" draws distinct cells, each equally likely. "gradient" leaves the cells open until
            `select_locations` has chosen them by the gradient of a few batches; before that, nothing can be trained or saved.
        location_gradient: the finite difference, "central", "forward" or "backward" (the last two are V4 and V5 of Table 5).
        seed: the seed for the initial locations. Each projection draws from (seed, its name), so targets do not affect each
            other.
        layers: name patterns of the layers to adapt, as in `AdapterConfig`; None: all.

    Raises:
        ValueError: a field is invalid; the message names the field, its value and the rule.
    """

    method: ClassVar[str] = "loca"
    title: ClassVar[str] = "LoCA"
    summary: ClassVar[str] = "cosine coefficients at learned locations"
    moves_locations: ClassVar[bool] = True

    n_components: int | Mapping[str, int] = 3000
    scale: float = 1.0
    targets: tuple[str, ...] = ("q", "v")
    location_init: Literal["uniform", "gradient"] = "uniform"
    location_gradient: Literal["central", "forward", "backward"] = "central"
    seed: int = 0
    layers: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("location_init", self.location_init, LOCATION_INITS)
        check_choice("location_gradient", self.location_gradient, LOCATION_GRADIENTS)

    def spectrum(self, shape: tuple[int, int], coefficients: Tensor, locations: Tensor) -> Spectrum:
        made = Spectrum(shape, coefficients, locations, scale=self.scale, difference=self.location_gradient)
        made.awaited = self.location_init == "gradient"
        return made

    def first_locations(self, projection: Projection, count: int, generator: torch.Generator) -> Tensor:
        if self.location_init == "gradient":
            return torch.full((count, 2), torch.nan)
        return super().first_locations(projection, count, generator)
