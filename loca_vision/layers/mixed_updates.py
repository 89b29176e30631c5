"""Add the updates of a mixture to the result of one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from loca_vision.functional.block_spectra import BlockSpectra, Share, add_blocks, apply_blocks
from loca_vision.functional.grouped_low_rank import apply_grouped
from loca_vision.functional.row_linear import Rows, computed_in
from loca_vision.functional.sample_spectra import SampleSpectrum
from loca_vision.functional.token_bases import TokenBasis
from loca_vision.functional.transforms import functional_only
from loca_vision.layers.mixtures import BATCHED, Mixture, PlacedUpdate

Parts = Sequence[tuple[int, slice | None]]  # the handle of each weight that is stacked in a layer, and its rows in the stack


class _Projection:
    """The updates of one projection, and those that each sample has."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.updates: list[PlacedUpdate] = []
        self.numbers: dict[int, int] = {}  # the index of each update, by its identity
        self.shares: dict[int, list[Share]] = {}  # by the index of the sample
        self.blocks: tuple[list[Any], BlockSpectra] | None = None

    def add(self, sample: int, placed: PlacedUpdate, strength: float) -> None:
        index = self.numbers.setdefault(id(placed), len(self.updates))
        if index == len(self.updates):
            self.updates.append(placed)
        self.shares.setdefault(sample, []).append((index, strength))

    def of(self, chosen: Sequence[int], samples: int) -> list[list[Share]]:
        """Return the shares of each sample in the chosen updates, renumbered in that order."""
        number = {index: i for i, index in enumerate(chosen)}
        return [
            [(number[index], strength) for index, strength in self.shares.get(sample, ()) if index in number]
            for sample in range(samples)
        ]


class _Layer:
    """All projections of a layer, and the number of samples it distinguishes: one if all have the same updates here."""

    def __init__(self, mixture: Mixture, parts: Parts) -> None:
        self.projections = _projections(mixture, parts)
        count = len(mixture.samples)
        shares = [[own.shares.get(sample, ()) for own in self.projections] for sample in range(count)]
        self.samples = 1 if all(own == shares[0] for own in shares) else count
        self.handles = [handle for handle, _ in parts]
        self.named = all(placed.named for own in self.projections for placed in own.updates)

    def check(self, x: Tensor) -> None:
        """Raise ValueError unless the first axis of x consists of equally many vectors for each sample."""
        if self.samples == 1:
            return
        tried = [BATCHED.get(handle) for handle in self.handles]
        if False in tried or x.dim() < 2 or len(x) % self.samples:
            raise ValueError(
                f"per_sample: an adapted layer is called with activations of shape {tuple(x.shape)}, which are not those of "
                f"one sample after the other: its updates cannot differ between the {self.samples} samples"
            )
        if None in tried and not self.named:
            raise ValueError(
                "per_sample: an adapted layer outside attention and MLPs may be called with anything. That is tried when the "
                "model itself is called in eager code: do so once, inside per_sample"
            )


@dataclass(frozen=True)
class MixedCall:
    """A call of a layer that mixes adapters.

    Args:
        mixture: the adapters of every sample.
        parts: the weights stacked in the layer.
        scale: the scale of the call.
        base: returns W; it is called only if an update depends on W.
    """

    mixture: Mixture
    parts: Parts
    scale: float
    base: Callable[[], Tensor]

    def added(self, result: Tensor, x: Tensor, *, in_place: bool) -> Tensor:
        """Add each sample's updates, applied to x (..., q), to the layer's result (..., n) for x, and return the sum.

        This is differentiable in x and in the trained parameters.

        Args:
            result: the result of the layer without updates.
            x: the input of the layer.
            in_place: whether the result may be written to if no gradient is recorded.

        Raises:
            ValueError: the first axis of x does not consist of equally many vectors for each sample.
        """
        handles = tuple(handle for handle, _ in self.parts)
        layer: _Layer = self.mixture.once(handles, lambda: _Layer(self.mixture, self.parts))
        layer.check(x)
        if not layer.projections or not x.numel():  # FFT libraries refuse empty tensors
            return result
        flat = x.reshape(layer.samples, -1, x.shape[-1])
        if in_place and not torch.is_grad_enabled() and not functional_only():
            self._write(result.view(*flat.shape[:2], -1), flat, layer)
            return result
        total = torch.zeros(*flat.shape[:2], result.shape[-1], dtype=computed_in(x), device=x.device)
        for projection in layer.projections:
            for term in _terms(flat, projection, layer.samples, self.base):
                total = _added(total, projection.rows, apply_blocks(flat, term) if isinstance(term, BlockSpectra) else term)
        total = total if self.scale == 1 else total * self.scale
        return result + total.view(result.shape).to(result.dtype)

    def _write(self, result: Tensor, x: Tensor, layer: _Layer) -> None:
        """Add each sample's updates in place to a result (M, t, n)."""
        for projection in layer.projections:
            rows = projection.rows
            own = None if isinstance(rows, Tensor) else result[..., rows or slice(None)]
            for term in _terms(x, projection, layer.samples, self.base):
                if isinstance(term, BlockSpectra):
                    if own is not None and own.dtype == torch.promote_types(x.dtype, torch.float32):
                        add_blocks(own, x, term, self.scale)
                        continue
                    term = apply_blocks(x, term)
                if own is not None:
                    own.add_(term.to(own.dtype), alpha=self.scale)
                elif isinstance(rows, Tensor):
                    result.index_add_(-1, rows.to(result.device), term.to(result.dtype), alpha=self.scale)


def _projections(mixture: Mixture, parts: Parts) -> list[_Projection]:
    found: dict[Any, _Projection] = {}
    for sample, entry in enumerate(mixture.by_sample()):
        for adapter, strength in entry:
            for handle, stacked in parts:
                for placed in adapter.updates.get(handle, ()):
                    if not placed.update.inactive:
                        where = placed.rows if stacked is None else stacked
                        key = id(where) if isinstance(where, Tensor) else str(where)
                        found.setdefault(key, _Projection(where)).add(sample, placed, strength)
    return list(found.values())


def _terms(x: Tensor, projection: _Projection, samples: int, base: Callable[[], Tensor]) -> Iterator[BlockSpectra | Tensor]:
    """Yield what each family of updates adds to the projection's rows: (M, t, p), or blocks that compute it from x."""
    spectra: dict[TokenBasis, dict[int, SampleSpectrum]] = {}
    pairs: dict[int, tuple[Tensor, Tensor]] = {}
    others: list[int] = []
    alone = functional_only()
    for index, placed in enumerate(projection.updates):
        here = not alone and all(tensor.device == x.device for tensor in placed.update.tensors())
        spectrum = placed.update.token_spectrum() if here else None
        pair = placed.update.factors() if here and spectrum is None else None
        if spectrum is not None:
            spectra.setdefault(spectrum[0], {})[index] = spectrum[1]
        elif pair is not None:
            pairs[index] = pair
        else:
            others.append(index)
    for basis, own in spectra.items():
        yield _blocks(projection, basis, own, samples)
    if pairs:
        yield apply_grouped(x, list(pairs.values()), projection.of(list(pairs), samples))
    for index in others:
        yield from _alone(x, projection, index, samples, base)


def _blocks(projection: _Projection, basis: TokenBasis, own: dict[int, SampleSpectrum], samples: int) -> BlockSpectra:
    """Return the blocks, cached until a component moves or a coefficient tensor is replaced."""
    mark: list[Any] = [basis]
    for one in own.values():
        mark += [one.layout, one.coefficients, one.locations, one.settings.scale]
    known = projection.blocks
    if known is not None and len(known[0]) == len(mark) and all(map(_same, known[0], mark)):
        return known[1]
    blocks = BlockSpectra(basis, list(own.values()), projection.of(list(own), samples))
    projection.blocks = mark, blocks
    return blocks


def _same(old: Any, new: Any) -> bool:
    return old is new or (isinstance(old, float) and old == new)


def _alone(x: Tensor, projection: _Projection, index: int, samples: int, base: Callable[[], Tensor]) -> Iterator[Tensor]:
    """Yield the term of one update for the samples that have it, for methods that have no faster way."""
    shares = {i: sum(s for j, s in projection.shares.get(i, ()) if j == index) for i in range(samples)}
    shares = {i: strength for i, strength in shares.items() if strength}
    if not shares:
        return
    update, chosen = projection.updates[index].update, torch.tensor(list(shares), device=x.device)
    weight = _rows_of(base(), projection.rows) if update.needs_weight else None
    part = x.index_select(0, chosen)
    if functional_only() or (torch.is_grad_enabled() and update.learns()):
        term = F.linear(part.to(computed_in(x)), update("delta", 1.0, weight).to(x.device, computed_in(x)))
    else:
        term = update("apply_to", part, 1.0, weight)
    strengths = torch.tensor(list(shares.values()), device=x.device, dtype=term.dtype)
    whole = term.new_zeros(len(x), *term.shape[1:])
    yield whole.index_add(0, chosen, term * strengths[:, None, None])


def _rows_of(weight: Tensor, rows: Rows) -> Tensor:
    return weight if rows is None else weight[rows.to(weight.device) if isinstance(rows, Tensor) else rows]


def _added(result: Tensor, rows: Rows, term: Tensor) -> Tensor:
    if rows is None and term.shape == result.shape:
        return result + term.to(result.dtype)
    where = torch.arange(result.shape[-1], device=result.device)
    where = where if rows is None else where[rows.to(result.device) if isinstance(rows, Tensor) else rows]
    return result.index_add(-1, where, term.to(result.dtype))
