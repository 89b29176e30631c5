"""The effective weight W + Delta W, computed once and cached until an input changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from loca_vision.functional.cosine_atoms import Cosines
from loca_vision.functional.cosine_linear import spectral_linear, workload_of
from loca_vision.functional.cost_model import builds_together, choose
from loca_vision.functional.low_rank_linear import low_rank_linear
from loca_vision.functional.row_linear import add_rows, computed_in, row_linear
from loca_vision.functional.transforms import compiled, functional_only, ordinary_tensors, traced, untraced
from loca_vision.layers.active_updates import (
    ActiveUpdate,
    Updates,
    deltas_of,
    learn,
    learned_cosines,
    split_low_rank,
    sum_with,
    tensors_of,
)
from loca_vision.layers.applied_updates import learned_term, matrix_of, term_without_matrix
from loca_vision.layers.batched_weights import read
from loca_vision.layers.built_together import BuiltTogether
from loca_vision.layers.call_settings import CallSettings
from loca_vision.layers.compiled_delta import CompiledDelta
from loca_vision.layers.mixtures import NOT_COPIED
from loca_vision.layers.update_groups import can_be_built
from loca_vision.layers.weight_cache import CachedWeight


class EffectiveWeight(CompiledDelta):
    """W + Delta W for one weight; a subclass defines which updates act on which of its rows.

    In eager mode the sum is cached together with a snapshot of its inputs; compiled code reads the buffer `delta`.
    """

    _loca_handle = 0  # for calls that mix adapters; 0 until the first such call

    def __init__(self) -> None:
        super().__init__()
        self._cached: CachedWeight | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EffectiveWeight:
        self._cached = None  # it is on the old device, in the old precision
        result: EffectiveWeight = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return result

    @property
    def call_settings(self) -> CallSettings:
        """The settings of the call, shared by all updates of a model."""
        raise NotImplementedError

    @property
    def together(self) -> BuiltTogether | None:
        """The set of weights that this one is built together with, or None."""
        raise NotImplementedError

    def stacked(self) -> Sequence[tuple[EffectiveWeight, slice | None]]:
        """Return the updates and the rows of each weight stacked in this one; for a single weight, itself and None."""
        raise NotImplementedError

    def can_be_built_together(self, base: Tensor) -> bool:
        """Whether training can build W + the active updates together with other weights."""
        return self.together is not None and can_be_built(self.active_updates(), base)

    def forward(self, base: Tensor) -> Tensor:
        """Return W + the active updates, (n, q) in W's dtype, rebuilt if gradients are recorded and cached otherwise."""
        if compiled():
            return self._in_graph(base)
        updates = self.active_updates()
        if not updates:
            return base
        if functional_only():
            return add_rows(base, deltas_of(updates, base, self.call_settings))
        if traced():
            return self._for_trace(base, updates)
        if torch.is_grad_enabled() and (base.requires_grad or learn(updates)):
            self.drop()
            together = self.together if builds_together(base.device) and not base.requires_grad else None
            taken = None if together is None else together.take(self, base, base.dtype)
            if taken is not None:
                return read(taken)
            return add_rows(base, deltas_of(updates, base, self.call_settings))
        return self._from_cache(base, updates, (), lambda: sum_with(updates, base, self.call_settings))

    def sum(self, base: Tensor) -> Tensor:
        """Return W + the active updates, newly built, without the scale of the call."""
        updates = self.active_updates()
        return sum_with(updates, base, None) if updates else base

    def acts(self) -> bool:
        """Whether any update acts on the weight now."""
        return len(self.active_updates()) > 0

    def learned_linear(self, x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor | None:
        """Return x (W + the active updates)^T + bias, with gradients for adapted rows only.

        Low-rank updates act on the activations, which avoids the gradient of a whole matrix. So do sums of cosines if the cost
        model finds that cheaper; otherwise the sum is built. Return None unless the updates are trained and W is not.
        """
        if not torch.is_grad_enabled() or base.requires_grad or torch.compiler.is_compiling():
            return None
        if functional_only() or traced():
            return None
        result = self._linear_together(x, base, bias) if builds_together(base.device) else None
        if result is not None:
            return result
        updates = self.active_updates()
        if not learn(updates):
            return None
        self.drop()
        call = self.call_settings
        matrices, pairs = split_low_rank(updates, call)
        if not matrices:
            return low_rank_linear(x, base, bias, pairs)
        learned = learned_cosines(updates, call.scale, base.device)
        if learned is not None:
            return self._linear_by_costs(x, base, bias, updates, learned)
        deltas = deltas_of(updates, base, call)
        with torch.no_grad():
            weight = add_rows(base, deltas)
        return row_linear(x, weight, bias, deltas)

    def _linear_by_costs(
        self, x: Tensor, base: Tensor, bias: Tensor | None, updates: Updates, learned: Sequence[tuple[ActiveUpdate, Cosines]]
    ) -> Tensor:
        """Compute `learned_linear` with each trained sum of cosines in the way that the cost model finds cheapest."""
        workloads = [workload_of(cosines) for _, cosines in learned]
        strategies = [decision.strategy for decision in choose(workloads, x.shape[:-1].numel(), x.device, computed_in(x))]
        if "together" in strategies:  # then it applies to all of them
            result = self._linear_together(x, base, bias)
            if result is not None:
                return result
            strategies = ["whole"] * len(strategies)
        applied = {id(active) for (active, _), way in zip(learned, strategies, strict=True) if way == "applied"}
        built = [active for active in updates if id(active) not in applied]
        with torch.no_grad():
            weight = sum_with(built, base, self.call_settings) if built else base
        return spectral_linear(x, weight, bias, [(active.rows, cosines) for active, cosines in learned], strategies)

    def _linear_together(self, x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor | None:
        """Compute `learned_linear` with a weight built together with others, or return None if that is impossible."""
        taken = None if self.together is None else self.together.take(self, base, computed_in(x))
        if taken is None:
            return None
        self.drop()
        weight, rows, tickets = taken
        return row_linear(x, weight, bias, list(zip(rows, tickets, strict=True))) if rows else F.linear(x, weight, bias)

    def applied(self, x: Tensor, rows: int, *, keep: bool, base: Callable[[], Tensor]) -> Tensor:
        """Return x times the sum of the active updates, (..., q) to (..., rows), for a weight that cannot be read or written.

        Args:
            x: the activations (..., q).
            rows: the number of rows of the weight.
            keep: whether the matrix of the sum may be cached.
            base: returns W; it is called only if an update depends on W.
        """
        call = self.call_settings
        if compiled() and self.delta is not None:
            return F.linear(x, call.scaled_in_graph(self.delta).to(x.dtype))
        updates = self.active_updates()
        if not updates:
            return x.new_zeros(*x.shape[:-1], rows)
        weight = base() if any([active.update.needs_weight for active in updates]) else None
        if functional_only():
            return learned_term(x, rows, updates, weight, call)
        if traced():
            with untraced(), torch.no_grad():
                matrix = matrix_of(x, rows, updates, weight, call)
            return F.linear(x, matrix)
        if torch.is_grad_enabled() and learn(updates):
            self.drop()
            return learned_term(x, rows, updates, weight, call)
        if not keep or call.low_memory:
            return term_without_matrix(x, rows, updates, weight, call)
        form = (computed_in(x), x.device)
        return F.linear(x, self._from_cache(weight, updates, form, lambda: matrix_of(x, rows, updates, weight, call)))

    def _in_graph(self, base: Tensor) -> Tensor:
        if self.delta is not None:
            return (base + self.call_settings.scaled_in_graph(self.delta)).to(base.dtype)
        updates = self.active_updates()
        return add_rows(base, deltas_of(updates, base, self.call_settings)) if updates else base

    def _for_trace(self, base: Tensor, updates: Updates) -> Tensor:
        """Return the weight as a constant of the trace, which runs where our operators are unknown.

        In training mode, if updates are trained, return a sum that can be differentiated instead.
        """
        if self.training and torch.is_grad_enabled() and learn(updates):
            return add_rows(base, deltas_of(updates, base, self.call_settings))
        with untraced(), torch.no_grad():
            return sum_with(updates, base.detach(), self.call_settings)

    def refresh(self) -> None:
        """Rewrite `delta` after adapters were added, removed or changed, and clear the cache if no update is active."""
        if self._cached is not None and not self.active_updates():
            self._cached = None
        super().refresh()

    def drop(self) -> None:
        """Release everything that was built."""
        if not torch.compiler.is_compiling():  # or compiled code would be recompiled whenever eager code caches something
            self._cached = None
        super().drop()

    def _from_cache(self, base: Tensor | None, updates: Updates, form: tuple[Any, ...], build: Callable[[], Tensor]) -> Tensor:
        """Return the cached weight, rebuilding it if W, the updates, their strengths or `form` have changed."""
        if self.together is not None:
            self.together.release()
        learned = list(tensors_of(updates))
        if learn(updates) and learned[0].device.type != "cpu" and dist.is_available() and dist.is_initialized():
            with torch.no_grad():
                return build()  # sharding refills gathered parameters unnoticed, and values are compared on the CPU only
        terms = (*form, self.call_settings.scale, *(active.strength for active in updates))
        cached = self._cached  # read once, because another thread may drop it in the meantime
        if cached is None or not cached.holds_for(base, learned, terms):
            with ordinary_tensors():
                self._cached = cached = CachedWeight(base, learned, terms, build())
        return cached.weight

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_cached": None} | NOT_COPIED
