"""Spectra of samples against dense matrices, forward and backward, in both bases; packed ones against those they came from."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loca_vision.functional.block_spectra import BlockSpectra, apply_blocks
from loca_vision.functional.cosine_atoms import AtomSettings, Cells
from loca_vision.functional.cosine_sum import cosine_sum
from loca_vision.functional.fourier import inverse_real
from loca_vision.functional.grouped_low_rank import apply_grouped
from loca_vision.functional.sample_spectra import SampleSpectrum, packed_cosines
from loca_vision.functional.shared_frequencies import shared_frequencies
from loca_vision.functional.token_bases import COSINES, WAVES, TokenBasis

SHAPES = [(6, 7), (7, 6), (8, 8), (1, 5), (5, 1), (16, 12)]
SHARES = [[(0, 1.0)], [(1, 0.5), (2, 2.0)], [], [(0, -1.0)], [(2, 1.0), (0, 1.0)]]
SCALE = 1.3


def spectra(shape: tuple[int, int], basis: TokenBasis, difference: str = "central") -> list[SampleSpectrum]:
    """Three in float64, of different sizes, with components at the same cell."""
    found = []
    for count in (4, 7, 3):
        cells = torch.stack([torch.randint(shape[0], (count,)), torch.randint(shape[1], (count,))], 1)
        cells[1] = cells[0]
        coefficients = torch.randn(count, dtype=torch.float64, requires_grad=True)
        locations = torch.rand(count, 2, dtype=torch.float64, requires_grad=True) if basis is COSINES else None
        settings = AtomSettings(shape, SCALE, difference)
        found.append(SampleSpectrum(coefficients, locations, Cells(cells, shape), settings))
    return found


def matrix(spectrum: SampleSpectrum, basis: TokenBasis) -> Tensor:
    if basis is WAVES:
        return inverse_real(spectrum.coefficients * SCALE, spectrum.layout)
    own, locations = spectrum.settings, spectrum.locations
    assert locations is not None
    return cosine_sum(spectrum.coefficients, locations, spectrum.layout.cells, own.shape, own.scale, own.difference)


def one_by_one(x: Tensor, matrices: list[Tensor], shares: list[list[tuple[int, float]]]) -> Tensor:
    """The oracle: every sample times the sum of its own matrices."""
    nothing = x.new_zeros(x.shape[1], matrices[0].shape[0])
    return torch.stack([sum((x[i] @ matrices[j].T * s for j, s in own), nothing) for i, own in enumerate(shares)])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("basis", [COSINES, WAVES], ids=["cosines", "waves"])
def test_every_sample_is_multiplied_by_its_own_sum(shape: tuple[int, int], basis: TokenBasis) -> None:
    own = spectra(shape, basis)
    x = torch.randn(len(SHARES), 5, shape[1], dtype=torch.float64, requires_grad=True)
    found = apply_blocks(x, BlockSpectra(basis, own, SHARES))
    wanted = one_by_one(x, [matrix(one, basis) for one in own], SHARES)
    numbers = [x, *(one.coefficients for one in own), *(one.locations for one in own if one.locations is not None)]
    weights = torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(found, numbers, weights), torch.autograd.grad(wanted, numbers, weights), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("difference", ["forward", "backward"])
def test_locations_learn_by_the_difference_that_was_chosen(difference: str) -> None:
    own = spectra((6, 7), COSINES, difference)
    x = torch.randn(len(SHARES), 5, 7, dtype=torch.float64)
    found = apply_blocks(x, BlockSpectra(COSINES, own, SHARES))
    wanted = one_by_one(x, [matrix(one, COSINES) for one in own], SHARES)
    locations = [one.locations for one in own if one.locations is not None]
    weights = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found, locations, weights), torch.autograd.grad(wanted, locations, weights), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [1, 40, 3000])  # several samples in a piece of the cache, one, and a part of one
def test_pieces_do_not_show(tokens: int) -> None:
    own = spectra((40, 48), COSINES)
    x = torch.randn(len(SHARES), tokens, 48)
    wanted = one_by_one(x.double(), [matrix(one, COSINES) for one in own], SHARES)
    found = apply_blocks(x, BlockSpectra(COSINES, own, SHARES))
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_spectra_are_those_they_came_from(shape: tuple[int, int]) -> None:
    own = spectra(shape, COSINES)
    flat = [one.layout.cells[:, 0] * shape[1] + one.layout.cells[:, 1] for one in own]
    held = packed_cosines([one.coefficients.detach() for one in own], flat, shape, SCALE)
    x = torch.randn(len(SHARES), 5, shape[1], dtype=torch.float64, requires_grad=True)
    found, wanted = (apply_blocks(x, BlockSpectra(COSINES, some, SHARES)) for some in (held, own))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    weights = torch.randn_like(wanted)
    mine, theirs = (torch.autograd.grad(y, x, weights)[0] for y in (found, wanted))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_packed_spectra_take_eight_bytes_a_component_in_two_blocks() -> None:
    values, cells = [torch.randn(40), torch.randn(30)], [torch.randperm(48)[:40], torch.randperm(48)[:30]]
    held = packed_cosines(values, cells, (6, 8), 1.0)
    assert sum(one.coefficients.nbytes + one.index.nbytes for one in held) == 8 * sum(map(len, cells))
    assert held[0].index.untyped_storage().data_ptr() == held[1].index.untyped_storage().data_ptr()


def test_a_matrix_that_int32_cannot_number_is_refused() -> None:
    with pytest.raises(ValueError, match="more frequencies than int32 can number"):
        packed_cosines([torch.ones(1)], [torch.zeros(1, dtype=torch.int32)], (2**16, 2**16), 1.0)


def test_frequencies_are_shared_and_follow_a_change() -> None:
    x = torch.randn(2, 3, 8)
    first = shared_frequencies(x, COSINES)
    assert shared_frequencies(x.view(2, 3, 8), COSINES) is first
    assert shared_frequencies(x.view(1, 6, 8), COSINES) is not first
    again = shared_frequencies(x, COSINES)
    x.add_(1)
    assert shared_frequencies(x, COSINES) is not again


@pytest.mark.parametrize("shares", [SHARES, [[(1, 0.5)]] * 5, [[(0, 1.0)], [], [], [], []]])
def test_low_rank_of_every_sample(shares: list[list[tuple[int, float]]]) -> None:
    chosen = sorted({index for own in shares for index, _ in own})
    ranks = [(1, 3, 2)[index] for index in chosen]
    pairs = [(torch.randn(6, r, requires_grad=True), torch.randn(r, 5, requires_grad=True)) for r in ranks]
    own = [[(chosen.index(index), strength) for index, strength in sample] for sample in shares]
    x = torch.randn(5, 4, 5, requires_grad=True)
    found, wanted = apply_grouped(x, pairs, own), one_by_one(x, [up @ down for up, down in pairs], own)
    numbers, weights = [x, *(factor for pair in pairs for factor in pair)], torch.randn_like(wanted)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(found, numbers, weights), torch.autograd.grad(wanted, numbers, weights), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
