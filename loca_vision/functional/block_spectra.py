"""Apply spectra that differ from sample to sample to a whole batch at once.

All samples go through one transform and one inverse transform. In between, the samples' spectra are the blocks of one sparse
block-diagonal matrix, so the cost is that of one spectrum, however many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from loca_vision.functional.cosine_atoms import AtomSettings, Offset, location_gradient, offsets
from loca_vision.functional.sample_spectra import SampleSpectrum
from loca_vision.functional.shared_frequencies import Piece, frequencies_of, shared_frequencies, wide
from loca_vision.functional.sparse_products import product
from loca_vision.functional.token_bases import Entries, TokenBasis
from loca_vision.functional.transforms import once_differentiable

Share = tuple[int, float]  # the index of a spectrum that a sample has, and its strength


class BlockSpectra:
    """The spectra of M samples for a matrix (p, q).

    Args:
        basis: the transform between activations and frequencies.
        spectra: all spectra.
        shares: the spectra that each sample has; empty for a sample without any.
    """

    def __init__(self, basis: TokenBasis, spectra: Sequence[SampleSpectrum], shares: Sequence[Sequence[Share]]) -> None:
        self.basis, self.spectra, self.shares = basis, tuple(spectra), [list(own) for own in shares]
        self.shape = spectra[0].settings.shape
        counts = [len(one.coefficients) for one in spectra]
        self.starts = [sum(counts[:i]) for i in range(len(counts) + 1)]

    @cached_property
    def applied(self) -> Blocks:
        """The matrix (M p', M q') that maps frequencies of inputs to those of outputs."""
        return Blocks(self, [own.applied(self.basis) for own in self.spectra], self.shape)

    @cached_property
    def transposed(self) -> Blocks:
        """The matrix (M q', M p') that maps gradients of outputs to those of inputs."""
        return Blocks(self, [own.transposed(self.basis) for own in self.spectra], self.shape[::-1])

    def products(self, offset: Offset) -> Blocks:
        """Return the matrix (M p', M q') whose entries would be the coefficients' gradients at this offset from their cells."""
        return Blocks(self, [own.products(self.basis, offset) for own in self.spectra], self.shape)

    def offsets(self, learned: bool, moving: bool) -> list[Offset]:
        """Return the offsets at which the gradients of coefficients and locations need products."""
        found = [offset for own in self.spectra for offset in offsets(own.settings.difference, learned, moving)]
        return list(dict.fromkeys(found))


class Blocks:
    """One sparse block-diagonal matrix with a block for each sample, which is the sum of the sample's spectra.

    Args:
        own: the spectra of all samples.
        entries: the entries of each spectrum in its block.
        shape: (p, q) of the matrix that a block represents.
    """

    def __init__(self, own: BlockSpectra, entries: Sequence[Entries], shape: tuple[int, int]) -> None:
        self.size = own.basis.width(shape[0]), own.basis.width(shape[1])
        parts = [(sample, i, strength) for sample, shares in enumerate(own.shares) for i, strength in shares]
        whole = _Parts(
            tuple(sample for sample, _, _ in parts),
            tuple(len(entries[i]) for _, i, _ in parts),
            tuple(own.starts[i] for _, i, _ in parts),
            tuple(own.spectra[i].settings.scale * strength for _, i, strength in parts),
        )
        sample, source, weights = whole.expanded(entries[0].index.device)
        index = torch.cat([entries[i].index for _, i, _ in parts]).long()
        self.rows = index // self.size[1] + sample * self.size[0]
        self.cols = index % self.size[1] + sample * self.size[1]
        plain = all(one.weights is None for one in entries)
        self.weights = weights if plain else weights * torch.cat([_weights(entries[i]) for _, i, _ in parts])
        self.source = source + torch.cat([_source(entries[i]) for _, i, _ in parts])
        if len(parts) > len(set(whole.samples)):  # some sample has several spectra, so its rows are out of order
            self._sort(self.size[1] * len(own.shares))
        self.ends = whole.ends(len(own.shares))

    def _sort(self, width: int) -> None:
        order = (self.rows * width + self.cols).argsort()
        self.rows, self.cols, self.weights, self.source = (
            values[order] for values in (self.rows, self.cols, self.weights, self.source)
        )

    def values(self, coefficients: Tensor) -> Tensor:
        """Return the values (e,) of the entries."""
        return coefficients[self.source] * self.weights.to(coefficients.dtype)

    def matrix(self, values: Tensor, first: int, end: int) -> Tensor:
        """Return the blocks of samples `first` to `end`, given the values (e,) of all entries."""
        here, many = slice(self.ends[first], self.ends[end]), end - first
        rows, cols = self.rows[here] - first * self.size[0], self.cols[here] - first * self.size[1]
        starts = torch.searchsorted(rows, torch.arange(many * self.size[0] + 1, device=rows.device))
        size = many * self.size[0], many * self.size[1]
        return torch.sparse_csr_tensor(starts, cols, values[here], size, check_invariants=False)


@dataclass(frozen=True)
class _Parts:
    """The spectra of all samples, one after the other.

    For each: its sample, its number of entries, where its coefficients start among all, and the factor they are multiplied by.
    """

    samples: tuple[int, ...]
    counts: tuple[int, ...]
    starts: tuple[int, ...]
    strengths: tuple[float, ...]

    def ends(self, samples: int) -> list[int]:
        """Return where the entries of each sample begin and end."""
        found = [0] * samples
        for sample, count in zip(self.samples, self.counts, strict=True):
            found[sample] += count
        return [0, *accumulate(found)]

    @lru_cache(maxsize=8)  # noqa: B019  equal for all layers of a model, so that it is copied to a GPU only once
    def expanded(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return sample, start and strength of every entry."""
        repeats = torch.tensor(self.counts, device=device)
        dtypes = torch.long, torch.long, torch.float32
        columns = zip((self.samples, self.starts, self.strengths), dtypes, strict=True)
        sample, start, strength = (
            torch.repeat_interleave(torch.tensor(own, dtype=dtype, device=device), repeats) for own, dtype in columns
        )
        return sample, start, strength


def _weights(entries: Entries) -> Tensor:
    return torch.ones(len(entries), device=entries.index.device) if entries.weights is None else entries.weights


def _source(entries: Entries) -> Tensor:
    return torch.arange(len(entries), device=entries.index.device) if entries.source is None else entries.source


def apply_blocks(x: Tensor, blocks: BlockSpectra) -> Tensor:
    """Return x times each sample's own update, (M, t, q) to (M, t, p), differentiable in x, coefficients and locations.

    The computation is at least in float32, regardless of autocast.
    """
    numbers = [own.coefficients for own in blocks.spectra], [own.locations for own in blocks.spectra]
    coefficients = torch.cat(numbers[0]) if len(numbers[0]) > 1 else numbers[0][0]
    moving = any(own is not None and own.requires_grad for own in numbers[1])
    locations = torch.cat([own for own in numbers[1] if own is not None]) if moving else None
    result: Tensor = _Applied.apply(x, coefficients, locations, blocks)
    return result


@torch.no_grad()
def add_blocks(onto: Tensor, x: Tensor, blocks: BlockSpectra, factor: float) -> None:
    """Add `factor` times `apply_blocks` in place to some columns of a result, (M, t, p), at least in float32."""
    coefficients = torch.cat([own.coefficients for own in blocks.spectra])
    with torch.autocast(x.device.type, enabled=False):
        _add_products(onto, blocks.applied, coefficients * factor, shared_frequencies(x, blocks.basis), blocks.basis)


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, coefficients: Tensor, locations: Tensor | None, blocks: BlockSpectra) -> Tensor:
        ctx.blocks = blocks
        ctx.save_for_backward(x, coefficients)
        result = x.new_zeros(*x.shape[:2], blocks.shape[0], dtype=wide(x))
        with torch.autocast(x.device.type, enabled=False):
            _add_products(result, blocks.applied, coefficients, shared_frequencies(x, blocks.basis), blocks.basis)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        blocks: BlockSpectra = ctx.blocks
        x, coefficients = ctx.saved_tensors
        wants_x, learned, moving = ctx.needs_input_grad[:3]
        with torch.autocast(grad.device.type, enabled=False):
            left = list(frequencies_of(grad.contiguous().to(wide(x)), blocks.basis))
            grad_x = None
            if wants_x:
                grad_x = torch.zeros_like(x, dtype=wide(x), memory_format=torch.contiguous_format)
                _add_products(grad_x, blocks.transposed, coefficients, left, blocks.basis)
                grad_x = grad_x.to(x.dtype)
            found = _spectra(blocks, left, shared_frequencies(x, blocks.basis), coefficients, blocks.offsets(learned, moving))
        slopes = _slopes(blocks, found, coefficients) if moving else None
        return grad_x, found[0, 0] if learned else None, slopes, None


def _spectra(
    blocks: BlockSpectra, left: Sequence[Piece], right: Sequence[Piece], like: Tensor, wanted: Sequence[Offset]
) -> dict[Offset, Tensor]:
    """Return, for each offset, the gradient (B,) of every coefficient if its component were there, for all spectra in order."""
    found: dict[Offset, Tensor] = {}
    for offset in wanted:
        own = blocks.products(offset)
        values = right[0].values.new_zeros(len(own.source)) if right else like.new_zeros(len(own.source))
        for outer, inner in zip(left, right, strict=True):
            pattern = own.matrix(values, inner.first, inner.end)
            sampled = torch.sparse.sampled_addmm(pattern, outer.values.flatten(0, 1), inner.values.flatten(0, 1).T)
            values[own.ends[inner.first] : own.ends[inner.end]] = sampled.values()
        total = torch.zeros_like(like)
        found[offset] = total.index_add_(0, own.source, (values * own.weights.to(values.dtype)).to(like.dtype))
    return found


def _slopes(blocks: BlockSpectra, found: dict[Offset, Tensor], coefficients: Tensor) -> Tensor:
    """Return the gradient (B, 2) of all locations from finite differences, as for one spectrum; `found` includes the scales."""
    slopes = []
    for own, start, end in zip(blocks.spectra, blocks.starts[:-1], blocks.starts[1:], strict=True):
        z = {offset: values[start:end] for offset, values in found.items()}
        settings = AtomSettings(blocks.shape, 1.0, own.settings.difference)
        if own.locations is not None:
            slopes.append(location_gradient(z, coefficients[start:end], settings))
    return torch.cat(slopes)


def _add_products(
    result: Tensor, matrix: Blocks, coefficients: Tensor, frequencies: Sequence[Piece], basis: TokenBasis
) -> None:
    """Apply the matrix to frequencies and add the outputs to the result (M, t, p), whose last axis is contiguous."""
    values = matrix.values(coefficients.to(result.dtype))
    for piece in frequencies:
        groups, _, tokens = piece.values.shape
        found = product(matrix.matrix(values, piece.first, piece.end), piece.values.flatten(0, 1))
        turned = found.view(groups, -1, tokens).transpose(1, 2).contiguous()
        rows = result[piece.first : piece.end, piece.token : piece.token + tokens].view(groups * tokens, -1)
        basis.add_synthesis(rows, turned.view(groups * tokens, -1))
