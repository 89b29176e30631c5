"""FourierFT: learn coefficients of a Fourier spectrum at fixed random cells (arXiv 2405.03003, ICML 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from loca_vision.checks import check_choice
from loca_vision.functional.cosine_atoms import AtomSettings
from loca_vision.functional.fourier import inverse_real
from loca_vision.functional.sample_spectra import SampleSpectrum
from loca_vision.functional.token_bases import WAVES, TokenBasis
from loca_vision.methods.locations import by_cell
from loca_vision.methods.registry import kind
from loca_vision.methods.sparse_config import SparseConfig, fixed
from loca_vision.methods.spectrum import Spectrum
from loca_vision.methods.update import Update


class FourierSpectrum(Spectrum):
    """Delta W = scale * Re(ifft2(F)) of shape (p, q), where F is zero except for B real coefficients.

    An atom cos(2 pi (u k / p + v l / q)) / (p q) has Frobenius norm 1 / sqrt(2 p q), or 1 / sqrt(p q) where it is its own
    mirror image (u in {0, p / 2} and v in {0, q / 2}).
    """

    def delta(self, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """Return `strength` times the update, (p, q) float32, differentiable in the coefficients."""
        return inverse_real(self.coefficients * (self.scale * strength), self.layout_now())

    def cosines(self, strength: float = 1.0) -> None:
        """Return None: Fourier atoms have no cosine fast path."""

    def token_spectrum(self) -> tuple[TokenBasis, SampleSpectrum]:
        settings = AtomSettings(self.shape, self.scale, self.difference)
        return WAVES, SampleSpectrum(self.coefficients, None, self.layout, settings)

    @torch.no_grad()
    def norm(self) -> float:
        """Return the Frobenius norm without building the matrix.

        The spectrum of the real part has half of each coefficient at its cell and the other half at the mirror image.
        """
        values, cells = self.coefficients.double() / 2, self.cells
        both = by_cell(torch.cat([values, values]), torch.cat([cells, -cells % torch.tensor(self.shape, device=cells.device)]))
        return abs(self.scale) * float(torch.linalg.vector_norm(both)) / math.sqrt(math.prod(self.shape))

    def apply_to(self, x: Tensor, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        return Update.apply_to(self, x, strength)


@kind
@dataclass(frozen=True)
class FourierFTConfig(SparseConfig):
    """The settings of FourierFT: W' = W0 + scale * Re(ifft2(F)), with real coefficients at fixed random cells.

    Args:
        n_components: the number of coefficients of each adapted projection (`n_frequency` in peft), from 1 to p * q, or a
            mapping from name patterns to such counts, as in `LoCAConfig`.
        scale: `scaling` in peft. Its meaning depends on the width: an atom has the norm scale / sqrt(2 p q), so that
            scale = sqrt(2 p q), 1086 for 768 x 768, corresponds to LoCA's 1.
        targets: which projections to adapt, as in `AdapterConfig`.
        coefficient_init: "zero", so that the update changes nothing at first, or "normal", which draws the coefficients from
            N(0, 1), as peft does by default.
        seed: the seed for the cells, and for the coefficients if they are drawn.
        layers: name patterns of the layers to adapt, as in `AdapterConfig`; None: all.

    Raises:
        ValueError: a field is invalid; the message names the field, its value and the rule.
    """

    method: ClassVar[str] = "fourierft"
    title: ClassVar[str] = "FourierFT"
    summary: ClassVar[str] = "Fourier coefficients at random locations"
    # LoCA's rates divided by 0.55, the norm of an atom of a 384 x 384 weight at peft's scaling of 300.
    lr_grid: ClassVar[tuple[float, ...]] = (3e-3, 9e-3, 2.7e-2)

    n_components: int | Mapping[str, int] = 3000
    scale: float = 300.0
    targets: tuple[str, ...] = ("q", "v")
    coefficient_init: Literal["zero", "normal"] = "zero"
    seed: int = 0
    layers: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("coefficient_init", self.coefficient_init, ("zero", "normal"))

    @classmethod
    def editing_defaults(cls, chosen: Mapping[str, Any]) -> dict[str, Any]:
        return {"scale": 64.0}  # LoCA, Table 11

    def spectrum(self, shape: tuple[int, int], coefficients: Tensor, locations: Tensor) -> FourierSpectrum:
        return fixed(FourierSpectrum(shape, coefficients, locations, scale=self.scale))

    def first_coefficients(self, count: int, generator: torch.Generator) -> Tensor:
        if self.coefficient_init == "zero":
            return super().first_coefficients(count, generator)
        return nn.init.normal_(torch.empty(count), generator=generator)
