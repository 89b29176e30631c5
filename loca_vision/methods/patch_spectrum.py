"""Updates whose atoms are small patches of the weight, so that building one takes only a few numbers per coefficient."""

from __future__ import annotations

import torch
from torch import Tensor

from loca_vision.functional.cosine_atoms import Cells
from loca_vision.functional.patches import Patches, scattered
from loca_vision.methods.spectrum import Spectrum
from loca_vision.methods.update import Update


class PatchSpectrum(Spectrum):
    """Delta W = scale * sum_k a_k P_k of shape (p, q), with B coefficients a at fixed cells; a subclass defines P_k."""

    def patches(self, layout: Cells) -> Patches:
        """Return the atoms at the cells of a layout."""
        raise NotImplementedError

    def delta(self, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """Return `strength` times the update, (p, q) float32, differentiable in the coefficients."""
        return scattered(self.coefficients * (self.scale * strength), self.patches(self.layout_now()), self.shape)

    def cosines(self, strength: float = 1.0) -> None:
        """Return None: these atoms are not cosines."""

    def apply_to(self, x: Tensor, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        return Update.apply_to(self, x, strength)

    @torch.no_grad()
    def norm(self) -> float:
        """Return the Frobenius norm without building the matrix, from the sums at the entries that the patches reach."""
        where, values = self.patches(self.layout)
        reached, place = torch.unique(where, return_inverse=True)
        terms = self.coefficients.double()[:, None] * values.double()
        sums = terms.new_zeros(len(reached)).index_add(0, place.flatten(), terms.flatten())
        return abs(self.scale) * float(torch.linalg.vector_norm(sums))
