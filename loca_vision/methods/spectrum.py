"""A sparse spectrum with trainable coefficients and locations, and the matrix it represents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.functional.cosine_atoms import AtomSettings, Cells, Cosines
from loca_vision.functional.cosine_sum import add_cosines, applied_to, cosine_applied, cosine_matrix, cosine_sum
from loca_vision.functional.sample_spectra import SampleSpectrum
from loca_vision.functional.snapshot import Snapshot
from loca_vision.functional.token_bases import COSINES, TokenBasis
from loca_vision.functional.token_spectra import shared_pieces
from loca_vision.functional.transforms import exported, functional_only, ordinary_tensors
from loca_vision.methods.adapter_config import generator_of
from loca_vision.methods.locations import by_cell, cells_at, random_locations
from loca_vision.methods.update import Update
from loca_vision.offload import stored


class Spectrum(Update):
    """Delta W = scale * C^T S D of shape (p, q), with B components (LoCA, Eq. 2).

    Args:
        shape: (p, q), rows (out_features) and columns (in_features) of the matrix.
        coefficients: (B,) the amplitudes.
        locations: (B, 2) rows and columns, scaled so that 0 is the first and 1 the last.
        scale: alpha.
        difference: the finite difference for the gradient of the locations, "central", "forward" or "backward".

    Attributes:
        coefficients: (B,) float32 parameter.
        locations: (B, 2) float32 parameter in [0, 1].
    """

    def __init__(
        self,
        shape: tuple[int, int],
        coefficients: Tensor,
        locations: Tensor,
        *,
        scale: float = 1.0,
        difference: str = "central",
    ) -> None:
        super().__init__(shape, scale)
        self.difference = difference
        self.count = len(coefficients)  # the components in use; zeros may follow as room for another adapter
        self.final = False  # whether the locations are fixed for good
        self.awaited = False  # whether locations may still be NaN because they have not been chosen yet
        self.scheduled = False  # whether a schedule decides what moves, so that frozen parameters may be trained again
        self._kept: tuple[Snapshot, Cells] | None = None
        self.coefficients = nn.Parameter(coefficients)
        self.locations = nn.Parameter(locations)

    @property
    def cells(self) -> Tensor:
        """The current row and column of each component, (B, 2) int64.

        NaN, from training that diverged, counts as 0: the loss shows the problem, whereas an index out of range would not.
        """
        if self.locations.dtype.itemsize < 4:
            raise RuntimeError(
                f"locations are in {self.locations.dtype}, which numbers cells wrongly: leave param_dtype out of FSDP's "
                "MixedPrecisionPolicy, and use autocast"
            )
        return cells_at(self.locations, self.shape)

    def delta(self, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """Return `strength` times the update, (p, q) float32, differentiable in coefficients and locations."""
        self._confine_what_moves()
        scale = self.scale * strength
        if functional_only():
            learns = self.training or not exported()
            locations = self.locations if learns else self.locations.detach()
            return cosine_sum(self.coefficients, locations, self.cells, self.shape, scale, self.difference)
        if self._trains_eagerly() and not torch.is_grad_enabled():
            return cosine_matrix(self.coefficients.detach(), self.layout, scale)
        return cosine_sum(self.coefficients, self.locations, self.cells, self.shape, scale, self.difference)

    def add_to(self, onto: Tensor, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        own = type(self).delta is Spectrum.delta  # a subclass may build a different matrix
        here = onto.dtype == self.coefficients.dtype and onto.device == self.coefficients.device
        if not (own and here) or onto.device.type != "cpu":
            return super().add_to(onto, strength, weight)
        self._confine_what_moves()
        layout = self.layout if self._trains_eagerly() else Cells(self.cells, self.shape)
        add_cosines(onto, self.coefficients.detach(), layout, self.scale * strength)
        return onto

    def cosines(self, strength: float = 1.0) -> Cosines | None:
        self._confine_what_moves()
        settings = AtomSettings(self.shape, self.scale * strength, self.difference)
        return Cosines(self.coefficients, self.locations, self.layout, settings)

    def token_spectrum(self) -> tuple[TokenBasis, SampleSpectrum] | None:
        own = self.cosines()
        if own is None:
            return None
        return COSINES, SampleSpectrum(own.coefficients, own.locations, own.layout, own.settings)

    @property
    def layout(self) -> Cells:
        """The cells and what is derived from them, cached from step to step until the locations change.

        On the CPU, changes are detected by comparing values. Other devices compare tensor versions, which optimisers with
        their own kernels may not update, so nothing is cached there while locations are trained.
        """
        held = [self.locations]
        if self.locations.requires_grad and self.locations.device.type != "cpu":
            self._kept = None
            return Cells(self.cells, self.shape)
        kept = self._kept
        if kept is None or not kept[0].holds_for(held, held):
            self._kept = kept = Snapshot(held, held), self._layout_like(kept and kept[1])
        return kept[1]

    def layout_now(self) -> Cells:
        """Return the layout; traced code computes its own."""
        return Cells(self.cells, self.shape) if torch.compiler.is_compiling() or functional_only() else self.layout

    def _layout_like(self, known: Cells | None) -> Cells:
        """Return a new layout, or `known` if no component has changed its cell, which is checked on the CPU only."""
        cells, cpu = self.cells, torch.device("cpu")
        if known is not None and known.cells.device == cells.device == cpu and torch.equal(known.cells, cells):
            return known
        return Cells(cells, self.shape)

    def _trains_eagerly(self) -> bool:
        """Whether training runs eagerly, so that results may be cached for the next step."""
        learns = self.coefficients.requires_grad or self.locations.requires_grad
        return learns and type(self.coefficients) is nn.Parameter and not torch.compiler.is_compiling()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}  # a copy or an unpickled spectrum computes its own

    def apply_to(self, x: Tensor, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """Return `strength` times x Delta W^T without building the matrix, from (..., q) to (..., p) in x's dtype.

        This takes two transforms of the activations and a sparse product. It is differentiable in x only.
        """
        scale, coefficients = self.scale * strength, self.coefficients.to(x.device)
        if torch.compiler.is_compiling() or functional_only() or (torch.is_grad_enabled() and x.requires_grad):
            return cosine_applied(x, coefficients, self.cells.to(x.device), self.shape, scale)
        layout = self.layout if self.locations.device == x.device else Cells(self.cells.to(x.device), self.shape)
        return applied_to(shared_pieces(x), x, coefficients.detach(), layout, scale)

    @torch.no_grad()
    def norm(self) -> float:
        """Return the Frobenius norm without building the matrix: atoms of different cells are orthonormal."""
        return abs(self.scale) * float(torch.linalg.vector_norm(by_cell(self.coefficients.double(), self.cells)))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.coefficients, self.locations

    def trainable(self) -> list[nn.Parameter]:
        return [self.coefficients]

    def location_parameters(self) -> list[nn.Parameter]:
        return [] if self.final else [self.locations]

    def learns(self) -> bool:
        own = self._parameters.values()  # faster than `tensors()`: this runs for every projection at every step
        return any([number.requires_grad for number in own]) if own else super().learns()  # type: ignore[union-attr]

    def is_trained(self) -> bool:
        return self.scheduled or self.learns()

    def confine(self) -> None:
        """Clamp the locations to [0, 1], as the function `confine` does for many spectra at once."""
        self.locations.data.clamp_(0, 1)

    def _confine_what_moves(self) -> None:
        """Clamp locations that are being trained, for training without a schedule (a schedule clamps them as well).

        Also refuse to train while the locations have not been chosen yet.
        """
        if self.awaited and self.coefficients.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._refuse_unchosen()
        if self.locations.requires_grad and not (torch.compiler.is_compiling() or functional_only()):
            self.confine()

    def _refuse_unchosen(self) -> None:
        if torch.isnan(self.locations).any():
            raise RuntimeError(
                "location_init='gradient': the locations are not chosen yet; call select_locations(model, losses) first"
            )
        self.awaited = False

    def check_fits(self, other: Update, place: str) -> None:
        if type(other) is not type(self) or not isinstance(other, Spectrum):
            raise ValueError(f"{place} is of another kind in the adapter that it should replace")
        if other.count > len(self.coefficients):
            raise ValueError(
                f"{place} has {other.count} components and the adapter that it should replace has room for "
                f"{len(self.coefficients)}; call enable_loca_hotswap before the first adapter is loaded, "
                f"with {other.count} or more"
            )

    @torch.no_grad()
    def copy_from(self, other: Update | None) -> None:
        self.inactive = other is None or other.inactive
        if not isinstance(other, Spectrum):
            return
        coefficients, locations = stored(self, "coefficients"), stored(self, "locations")
        coefficients.zero_()
        coefficients[: other.count] = other.coefficients[: other.count].to(coefficients.device)
        locations[: other.count] = other.locations[: other.count].to(locations.device)
        self.count, self.scale, self.difference, self.final = other.count, other.scale, other.difference, other.final


def confine(spectra: Sequence[Spectrum]) -> None:
    """Clamp locations that an optimiser has moved out of [0, 1], so that every cell stays within reach."""
    values = [spectrum.locations.data for spectrum in spectra]
    torch._foreach_clamp_min_(values, 0.0)  # on an accelerator, one launch per call for all of them
    torch._foreach_clamp_max_(values, 1.0)


def random_spectrum(shape: tuple[int, int], n_components: int, *, name: str, seed: int, **settings: Any) -> Spectrum:
    """Return a spectrum of zero coefficients at distinct cells, drawn on the CPU from (seed, name)."""
    with torch.device("cpu"), ordinary_tensors():
        locations = random_locations(shape, n_components, generator_of(seed, name))
        return Spectrum(shape, torch.zeros(n_components, dtype=torch.float32), locations, **settings)
