"""WaveFT: learn coefficients of a wavelet transform at fixed random cells (arXiv 2505.12532)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from torch import Tensor

from loca_vision.functional.cosine_atoms import Cells
from loca_vision.functional.patches import Bank, Patches, wavelet_atoms
from loca_vision.messages import nearest
from loca_vision.methods.patch_spectrum import PatchSpectrum
from loca_vision.methods.registry import kind
from loca_vision.methods.sparse_config import SparseConfig, fixed
from loca_vision.methods.update import Update

_HAAR = 0.5**0.5
_LONGEST = 20  # the longest filter allowed, because an atom has as many numbers as the square of its length


class WaveletSpectrum(PatchSpectrum):
    """Delta W = scale * idwt2(S) of shape (p, q): a one-level transform, where S is zero except for B coefficients.

    Atoms of orthogonal wavelets have Frobenius norm 1, or less if they extend beyond the border.
    """

    def __init__(self, *arguments: Any, wavelet: str, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.wavelet = wavelet

    def patches(self, layout: Cells) -> Patches:
        return layout.once(wavelet_atoms, filters(self.wavelet))

    def copy_from(self, other: Update | None) -> None:
        super().copy_from(other)
        if isinstance(other, WaveletSpectrum):
            self.wavelet = other.wavelet


@cache
def filters(wavelet: str) -> Bank:
    """Return the filters of a wavelet by its PyWavelets name; all but "haar" and "db1" need that package.

    Raises:
        ValueError: there is no wavelet of that name, or its filters have more than 20 numbers.
        ModuleNotFoundError: PyWavelets is not installed.
    """
    if wavelet in ("haar", "db1"):
        return Bank((_HAAR, _HAAR), (_HAAR, -_HAAR))
    try:
        import pywt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"wavelet={wavelet!r}: PyWavelets has its filters and is missing: python -m pip install 'loca-vision[wavelets]'",
            name="pywt",
        ) from error
    known = pywt.wavelist(kind="discrete")
    if wavelet not in known:
        raise ValueError(f"wavelet={wavelet!r}: expected one of PyWavelets' discrete wavelets{nearest(wavelet, known)}")
    found = pywt.Wavelet(wavelet)
    if len(found.rec_lo) > _LONGEST:
        raise ValueError(f"wavelet={wavelet!r}: its filters have {len(found.rec_lo)} numbers, of at most {_LONGEST}")
    return Bank(tuple(found.rec_lo), tuple(found.rec_hi))


@kind
@dataclass(frozen=True)
class WaveFTConfig(SparseConfig):
    """The settings of WaveFT: W' = W0 + scale * idwt2(S), with coefficients at fixed random cells of a one-level transform.

    Args:
        n_components: the number of coefficients of each adapted projection (`n_frequency` in peft), from 1 to p * q, or a
            mapping from name patterns to such counts, as in `LoCAConfig`.
        scale: `scaling` in peft, with the same default. Before scaling, atoms have norm 1, as in LoCA.
        targets: which projections to adapt, as in `AdapterConfig`.
        wavelet: the name of a discrete wavelet in PyWavelets (`wavelet_family` in peft) whose filters have at most 20
            numbers. All but the Haar wavelet, "db1" or "haar", need that package.
        seed: the seed for the cells.
        layers: name patterns of the layers to adapt, as in `AdapterConfig`; None: all.

    Raises:
        ValueError: a field is invalid; the message names the field, its value and the rule.
        ModuleNotFoundError: the wavelet needs PyWavelets, which is not installed.
    """

    method: ClassVar[str] = "waveft"
    title: ClassVar[str] = "WaveFT"
    summary: ClassVar[str] = "wavelet coefficients at random locations"
    # LoCA's rates divided by the scale.
    lr: ClassVar[float] = 2e-3
    lr_grid: ClassVar[tuple[float, ...]] = (6e-5, 2e-4, 6e-4)
    edit_lr: ClassVar[float] = 8e-4

    n_components: int | Mapping[str, int] = 3000
    scale: float = 25.0
    targets: tuple[str, ...] = ("q", "v")
    wavelet: str = "db1"
    seed: int = 0
    layers: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.wavelet, str):
            raise ValueError(f"wavelet={self.wavelet!r}: expected the name of a wavelet")
        filters(self.wavelet)

    def spectrum(self, shape: tuple[int, int], coefficients: Tensor, locations: Tensor) -> WaveletSpectrum:
        return fixed(WaveletSpectrum(shape, coefficients, locations, scale=self.scale, wavelet=self.wavelet))
