"""Build effective weights of one shape together, at the first use of one of them in a pass.

An accelerator spends more time launching the operations of one update than executing them. Each weight is handed out once:
asking for it again begins another pass, for which all weights are rebuilt.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from loca_vision.functional.batch_tables import BatchCells
from loca_vision.functional.cosine_atoms import AtomSettings
from loca_vision.functional.cosine_batch import batch_of
from loca_vision.functional.snapshot import Snapshot, last_unseen_step, version_of
from loca_vision.layers.active_updates import ActiveUpdate
from loca_vision.layers.batched_weights import Built, Part, built, layout_of
from loca_vision.layers.plain_weight import is_plain_matrix
from loca_vision.layers.update_groups import fit, groups_of, kind_of, learn_here, range_of
from loca_vision.methods.spectrum import Spectrum, confine

if TYPE_CHECKING:
    from loca_vision.layers.effective_weight import EffectiveWeight

# Bytes of the float32 weights built at once. All gradients of a batch are in memory together in the backward pass.
LARGEST_BATCH = 2**28


@dataclass(frozen=True)
class _Member:
    """A weight that may be built with others, and the updates that act on it."""

    weight: weakref.ref[EffectiveWeight]
    base: weakref.ref[Tensor]
    updates: tuple[ActiveUpdate, ...]

    def kind(self, base: Tensor) -> tuple[Any, ...]:
        """Return what the members of a batch must have in common."""
        return base.shape, base.dtype, base.device, *[(*kind_of(one), range_of(one)) for one in self.updates]

    def state(self, base: Tensor, scale: float, dtype: torch.dtype) -> tuple[Any, ...]:
        """Return what must not have changed between building a weight and handing it out.

        The last entry identifies the backward pass, if one is running.
        """
        numbers: list[Any] = [number for one in self.updates for number in one.update._parameters.values()]
        marks = [(version_of(number), number.data_ptr(), number.requires_grad) for number in (base, *numbers)]
        return (*marks, last_unseen_step(), scale, dtype, torch._C._current_graph_task_id())


class _Batch:
    """A batch of weights that have been built, and those of them that have not been handed out yet."""

    def __init__(self) -> None:
        self.left: dict[int, Built] = {}
        self.states: dict[int, tuple[Any, ...]] = {}
        self.spent = [False]  # whether gradients have flowed through; shared with the graph, which must not be kept alive here


class BuiltTogether:
    """The weights of one model that are built together, which are those that have been asked for so far.

    Several threads may call the model, so state that another thread may change is read only once, and copied before it is
    iterated over.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget everything, after updates were added, removed or changed in how they act."""
        self._members: dict[int, _Member] = {}  # by the weight's identity; a member without updates cannot take part
        self._near: dict[int, list[_Member]] = {}  # by the weight's identity: the members that may be built with it
        self._dtypes: dict[int, torch.dtype] = {}  # by the weight's identity: the dtype of the activations at the last call
        self._batches: dict[int, _Batch] = {}  # by the weight's identity: the batch that it was last built in
        self._layouts: dict[tuple[int, ...], tuple[Snapshot, BatchCells]] = {}

    def release(self) -> None:
        """Release batches that gradients have flowed through, including weights for layers that the pass skipped."""
        if self._batches:
            self._batches = {key: batch for key, batch in tuple(self._batches.items()) if not batch.spent[0]}

    def take(self, weight: EffectiveWeight, base: Tensor, dtype: torch.dtype) -> Built | None:
        """Return the effective weight for activations of this dtype, or None if it cannot be built together with others."""
        member = self._member(weight, base)
        if member is None:
            return None
        expected = self._dtypes.get(id(weight)) is dtype
        self._dtypes[id(weight)] = dtype
        scale = weight.call_settings.scale
        state, batch = member.state(base, scale, dtype), self._batches.get(id(weight))
        if batch is not None and not batch.spent[0] and batch.states.get(id(weight)) == state:
            found = batch.left.pop(id(weight), None)
            if found is not None:
                return found
            if batch.left:  # a layer that runs more than once in a pass
                return self._alone(member, base, scale, dtype)
        if not learn_here(member.updates, base):
            return None
        if not expected:  # the other weights of this pass have been handed out already, and would all be built once more
            return self._alone(member, base, scale, dtype)
        return self._with_others(member, base, scale, dtype)

    def _alone(self, member: _Member, base: Tensor, scale: float, dtype: torch.dtype) -> Built:
        return self._built([member], [base], scale, dtype, [False])[0]

    def _member(self, weight: EffectiveWeight, base: Tensor) -> _Member | None:
        known = self._members.get(id(weight))
        if known is not None and known.weight() is weight and known.base() is base:
            return known if known.updates else None
        updates = tuple(weight.active_updates())
        chosen = updates if fit(updates, base) else ()
        self._members[id(weight)] = known = _Member(weakref.ref(weight), weakref.ref(base), chosen)
        self._near = {}
        return known if chosen else None

    def _with_others(self, member: _Member, base: Tensor, scale: float, dtype: torch.dtype) -> Built:
        members, bases = self._alike(member, base, dtype)
        batch = _Batch()
        mine, *left = self._built(members, bases, scale, dtype, batch.spent)
        batch.left = {id(other.weight()): one for other, one in zip(members[1:], left, strict=True)}
        pairs = zip(members, bases, strict=True)
        batch.states = {id(own.weight()): own.state(its_base, scale, dtype) for own, its_base in pairs}
        self._batches |= dict.fromkeys(batch.states, batch)
        return mine

    def _alike(self, member: _Member, base: Tensor, dtype: torch.dtype) -> tuple[list[_Member], list[Tensor]]:
        """Return the member and those near it whose updates, training and dtype match, together with their bases."""
        near = self._near
        if id(member.weight()) not in near:
            self._near = near = self._portions()
        kind, members, bases = member.kind(base), [member], [base]
        for other in near.get(id(member.weight()), ()):
            its_base = other.base()
            if other is member or its_base is None or other.weight() is None or not is_plain_matrix(its_base):
                continue
            if self._dtypes.get(id(other.weight())) is not dtype:
                continue
            if learn_here(other.updates, its_base) and other.kind(its_base) == kind:
                members.append(other)
                bases.append(its_base)
        return members, bases

    def _portions(self) -> dict[int, list[_Member]]:
        """Split the members whose weights have one shape into portions that may be built at once."""
        by_shape: dict[torch.Size, list[_Member]] = {}
        for member in tuple(self._members.values()):
            base = member.base()
            if base is not None and member.updates:
                by_shape.setdefault(base.shape, []).append(member)
        found: dict[int, list[_Member]] = {}
        for shape, members in by_shape.items():
            many = max(1, LARGEST_BATCH // max(1, 4 * shape.numel()))
            portions = [members[start : start + many] for start in range(0, len(members), many)]
            found |= {id(member.weight()): portion for portion in portions for member in portion}
        return found

    def _built(
        self, members: Sequence[_Member], bases: Sequence[Tensor], scale: float, dtype: torch.dtype, spent: list[bool]
    ) -> list[Built]:
        return built([self._part(members, which, scale, dtype) for which in groups_of(members[0].updates)], bases, dtype, spent)

    def _part(self, members: Sequence[_Member], which: Sequence[int], scale: float, dtype: torch.dtype) -> Part:
        """Return the sums of these updates of every member."""
        chosen = [(index, member.updates[i]) for index, member in enumerate(members) for i in which]
        own = [cast(Spectrum, active.update) for _, active in chosen]
        settings = AtomSettings(own[0].shape, own[0].scale * (scale * chosen[0][1].strength), own[0].difference)
        layout = self._layout(own)
        with torch.no_grad():
            coefficients = torch.cat([spectrum.coefficients for spectrum in own])
        batch = batch_of(coefficients, layout, settings, dtype)
        spectra = zip([index for index, _ in chosen], own, strict=True)
        return Part(batch, tuple(spectra), tuple(active.rows for _, active in chosen))

    def _layout(self, spectra: Sequence[Spectrum]) -> BatchCells:
        """Return the layout of the spectra, cached as long as no location moves."""
        key, locations = tuple(map(id, spectra)), [own.locations for own in spectra]
        if locations[0].requires_grad:
            self._layouts = {ids: kept for ids, kept in tuple(self._layouts.items()) if not {*ids} & {*key}}
            confine(spectra)
            return layout_of(spectra)
        kept = self._layouts.get(key)
        if kept is None or not kept[0].holds_for(locations, locations):
            self._layouts[key] = kept = Snapshot(locations, locations), layout_of(spectra)
        return kept[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return BuiltTogether, ()  # a copy or an unpickled object collects its own weights
