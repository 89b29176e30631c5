"""The effective weight W + Delta W, computed once and cached until an input changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loca_vision.functional.cosine_atoms import Cosines
from loca_vision.functional.cosine_linear import asked_of, spectral_linear
from loca_vision.functional.cost_model import choose
from loca_vision.functional.low_rank_linear import LowRankRows, low_rank_linear, low_rank_term
from loca_vision.functional.row_linear import RowDelta, Rows, add_in_place, add_rows, computed_in, row_linear
from loca_vision.layers.call_settings import CallSettings
from loca_vision.layers.weight_cache import _Kept
from loca_vision.methods.update import Update


@dataclass(frozen=True)
class ActiveUpdate:
    """One update that acts on a weight: on which of its rows, how strongly, and the projection it belongs to."""

    projection: str
    rows: Rows
    update: Update
    strength: float


class EffectiveWeight(nn.Module):
    """W + Delta W for one weight; which updates act on which of its rows, a subclass says.

    In eager mode the sum is kept with a note of what it was made from. Compiled code finds the update in the buffer `delta`,
    made when the code is traced and rewritten in place by `refresh` whenever adapters change, so that nothing is compiled anew.
    """

    delta: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("delta", None, persistent=False)
        self._kept: _Kept | None = None
        # the weight that `delta` was made for; in a tuple, for it is another's parameter
        self._settled: tuple[Tensor] | None = None
        self.register_load_state_dict_post_hook(_after_loading)  # type: ignore[no-untyped-call]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EffectiveWeight:
        self._kept = None  # on the device, and in the precision, of before
        result: EffectiveWeight = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return result

    def active_updates(self) -> list[ActiveUpdate]:
        """What acts on the weight now."""
        raise NotImplementedError

    def all_updates(self) -> list[Update]:
        """Acting or not."""
        raise NotImplementedError

    @property
    def circumstances(self) -> CallSettings:
        raise NotImplementedError

    # The weight

    def forward(self, base: Tensor) -> Tensor:
        """W + sum of the acting updates, in W's dtype and shape; built anew where gradients are wanted, else kept."""
        if torch.compiler.is_compiling():
            return self._traced(base)
        acting = self.active_updates()
        if not acting:
            return base
        if torch.is_grad_enabled() and any(value.requires_grad for value in (base, *_tensors(acting))):
            self.drop()
            return add_rows(base, self._deltas(acting, base))
        return self._kept_or(base, acting, (), lambda: self._built(acting, base))

    def sum(self, base: Tensor) -> Tensor:
        """W + sum of the acting updates, built anew and not kept; whatever the strength of the last call."""
        acting = self.active_updates()
        return self._built(acting, base, of_call=False) if acting else base

    def learns_alone(self, base: Tensor) -> bool:
        """Whether a gradient is wanted of the updates, and none of W."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or base.requires_grad:
            return False
        return any(value.requires_grad for value in _tensors(self.active_updates()))

    def linear(self, x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + sum of the acting updates)^T + bias, where `learns_alone`: no other row's gradient is computed.

        Updates all of low rank act on the activations, which spares the gradient of a whole matrix. So do cosines where `paths`
        finds that cheaper; else the sum is built.
        """
        self.drop()
        acting = self.active_updates()
        whole, pairs = self._by_rank(acting)
        if not whole:
            return low_rank_linear(x, base, bias, pairs)
        learned = _learned_cosines(acting, self.circumstances.number, base.device)
        if learned is None:
            updates = self._deltas(acting, base)
            with torch.no_grad():
                weight = add_rows(base, updates)
            return row_linear(x, weight, bias, updates)
        asked = [asked_of(cosines) for _, cosines in learned]
        ways = [choice.way for choice in choose(asked, x.shape[:-1].numel(), x.device, computed_in(x))]
        applied = {id(one) for (one, _), way in zip(learned, ways, strict=True) if way == "applied"}
        built = [one for one in acting if id(one) not in applied]
        with torch.no_grad():
            weight = self._built(built, base) if built else base
        return spectral_linear(x, weight, bias, [(one.rows, cosines) for one, cosines in learned], ways)

    # The update alone, for weights that cannot be read or must not be written out

    def applied(self, x: Tensor, rows: int, *, keep: bool, base: Callable[[], Tensor]) -> Tensor:
        """x times the sum of the acting updates, (..., q) to (..., rows): with a matrix that is kept, or without any.

        Args:
            base: gives W, which is asked for where an update depends on it.
        """
        if torch.compiler.is_compiling() and self.delta is not None:
            return F.linear(x, (self.circumstances.factor * self.delta).to(x.dtype))
        acting = self.active_updates()
        if not acting:
            return x.new_zeros(*x.shape[:-1], rows)
        weight = base() if any([one.update.needs_weight for one in acting]) else None
        if torch.is_grad_enabled() and any([value.requires_grad for value in _tensors(acting)]):
            self.drop()
            whole, pairs = self._by_rank(acting)
            result = F.linear(x, self._matrix(x, rows, whole, weight)) if whole else x.new_zeros(())
            return result + low_rank_term(x, rows, pairs) if pairs else result
        if not keep or self.circumstances.low_memory:
            return self._by_activations(x, rows, acting, weight)
        form = (computed_in(x), x.device)
        return F.linear(x, self._kept_or(weight, acting, form, lambda: self._matrix(x, rows, acting, weight)))

    def _by_rank(self, acting: list[ActiveUpdate]) -> tuple[list[ActiveUpdate], list[LowRankRows]]:
        """Those that are to be built, and the factors of those that are not."""
        whole, pairs = [], []
        for one in acting:
            pair = one.update.factors(self.circumstances.number * one.strength)
            if pair is None:
                whole.append(one)
            else:
                up = pair[0] * self.circumstances.factor if torch.compiler.is_compiling() else pair[0]
                pairs.append((one.rows, up, pair[1]))
        return whole, pairs

    def _matrix(self, x: Tensor, rows: int, acting: list[ActiveUpdate], weight: Tensor | None) -> Tensor:
        empty = torch.zeros(rows, x.shape[-1], device=x.device)
        return add_rows(empty, self._deltas(acting, empty if weight is None else weight, x.device)).to(computed_in(x))

    def _by_activations(self, x: Tensor, rows: int, acting: list[ActiveUpdate], weight: Tensor | None) -> Tensor:
        result = x.new_zeros(*x.shape[:-1], rows)
        for one in acting:
            part = one.update(self.circumstances.number * one.strength, x, _rows_of(weight, one, x.device)).to(result.dtype)
            if torch.compiler.is_compiling():
                part = part * self.circumstances.factor.to(part.dtype)
            if one.rows is None and part.shape == result.shape:
                result = result + part
            else:
                where = torch.arange(rows, device=x.device)[one.rows if one.rows is not None else slice(None)]
                result = result.index_add(-1, where, part)
        return result

    # Compiled code

    def _traced(self, base: Tensor) -> Tensor:
        if self.delta is not None:
            return (base + self.circumstances.factor * self.delta).to(base.dtype)
        acting = self.active_updates()
        return add_rows(base, self._deltas(acting, base)) if acting else base

    def learns(self) -> bool:
        """Whether any update here may still change by training, acting or not: compiled code then builds it."""
        return any([value.requires_grad for update in self.all_updates() for value in update.tensors()])

    def settle(self, base: Tensor) -> None:
        """Make the update that compiled code reads, for a weight like `base`; once made, `refresh` keeps it up to date."""
        if self.delta is None:
            with torch.inference_mode(False), torch.no_grad():
                dtype = base.dtype if base.element_size() > 1 else torch.float32  # stored in eight bits, not computed with
                self.delta = torch.zeros(base.shape, dtype=dtype, device=base.device)
                self._settled = (base,)
                self.refresh()

    def refresh(self) -> None:
        """After adapters came, went or changed: rewrite `delta` in place, where there is one, and keep nothing in vain."""
        if self._kept is not None and not self.active_updates():
            self._kept = None
        if self.delta is not None:
            self._rewrite(self.delta)

    @torch.no_grad()
    def _rewrite(self, delta: Tensor) -> None:
        wide = torch.zeros(delta.shape, device=delta.device)
        base = self._settled[0] if self._settled else delta
        deltas = self._deltas(self.active_updates(), base, delta.device, of_call=False)
        delta.copy_(add_rows(wide, deltas) if deltas else wide)

    def drop(self) -> None:
        """Let go of all that was built."""
        if not torch.compiler.is_compiling():  # which would be compiled anew when eager code keeps something
            self._kept = None
        if self.delta is not None:
            self.delta = None
            self._settled = None

    # Building

    def _built(self, acting: list[ActiveUpdate], base: Tensor, *, of_call: bool = True) -> Tensor:
        """W + sum of the updates, in W's dtype: added in place where nobody asks for gradients, and to the same bits."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return add_rows(base, self._deltas(acting, base, of_call=of_call))
        wide = base.to(torch.promote_types(base.dtype, torch.float32), copy=True)
        for several in _by_projection(acting):
            one, factor = several[0], self.circumstances.number if of_call else 1.0
            if len(several) > 1 or isinstance(one.rows, Tensor):
                add_in_place(wide, self._deltas(several, base, of_call=of_call))
            else:
                one.update.add_to(wide[one.rows or slice(None)], factor * one.strength, _rows_of(base, one, base.device))
        return wide.to(base.dtype)

    def _deltas(
        self, acting: list[ActiveUpdate], base: Tensor, device: torch.device | None = None, *, of_call: bool = True
    ) -> list[RowDelta]:
        """The rows and the update of each projection of W, summed over the acting adapters; by default on W's device."""
        device = device or base.device
        factor = self.circumstances.number if of_call else 1.0
        deltas: dict[str, RowDelta] = {}
        for one in acting:
            delta = one.update(factor * one.strength, None, _rows_of(base, one, device)).to(device)
            if of_call and torch.compiler.is_compiling():
                delta = delta * self.circumstances.factor
            if one.projection in deltas:
                delta = deltas[one.projection][1] + delta
            deltas[one.projection] = one.rows, delta
        return list(deltas.values())

    def _kept_or(
        self, base: Tensor | None, acting: list[ActiveUpdate], form: tuple[Any, ...], build: Callable[[], Tensor]
    ) -> Tensor:
        """What is kept, as long as W, spectra, strengths and the form that is asked for are those it was built from."""
        learned = list(_tensors(acting))
        terms = (*form, self.circumstances.number, *(one.strength for one in acting))
        kept = self._kept  # one reading: another thread may drop it meanwhile
        if kept is None or not kept.holds_for(base, learned, terms):
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = _Kept(base, learned, terms, build())
        return kept.weight

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_kept": None, "_settled": None}  # a copy or a pickle builds its own
        return state | {"_buffers": state["_buffers"] | {"delta": None}}


def _by_projection(acting: list[ActiveUpdate]) -> list[list[ActiveUpdate]]:
    found: dict[str, list[ActiveUpdate]] = {}
    for one in acting:
        found.setdefault(one.projection, []).append(one)
    return list(found.values())


def _tensors(acting: list[ActiveUpdate]) -> Iterator[Tensor]:
    for one in acting:
        yield from one.update.tensors()


def _learned_cosines(
    acting: list[ActiveUpdate], factor: float, device: torch.device
) -> list[tuple[ActiveUpdate, Cosines]] | None:
    """What learns, where all of it is sums of cosines that are at hand on the device."""
    found: list[tuple[ActiveUpdate, Cosines]] = []
    for one in acting:
        if not any(value.requires_grad for value in one.update.tensors()):
            continue
        cosines = one.update.cosines(factor * one.strength)
        if cosines is None or cosines.coefficients.device != device:
            return None
        found.append((one, cosines))
    return found


def _rows_of(weight: Tensor | None, one: ActiveUpdate, device: torch.device) -> Tensor | None:
    """The rows of W that an update needs to know; nothing for those that need none."""
    if weight is None or not one.update.needs_weight:
        return None
    return (weight if one.rows is None else weight[one.rows]).to(device)


def _after_loading(reading: nn.Module, keys: Any) -> None:
    """After `load_state_dict`: other values may be there, and compiled code would not look."""
    reading.refresh()  # type: ignore[operator]
