"""Determine which updates of a weight can be built together with others, and which of them form a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from loca_vision.layers.active_updates import ActiveUpdate
from loca_vision.layers.plain_weight import is_plain_matrix
from loca_vision.methods.spectrum import Spectrum


def can_be_built(updates: Sequence[ActiveUpdate], base: Tensor) -> bool:
    """Whether the weight W + these updates can currently be built together with others."""
    return not base.requires_grad and fit(updates, base) and learn_here(updates, base)


def fit(updates: Sequence[ActiveUpdate], base: Tensor) -> bool:
    """Whether all updates are sums of cosines on all rows, or on ranges of rows, of an ordinary matrix."""
    able = all(type(one.update).delta is Spectrum.delta and not isinstance(one.rows, Tensor) for one in updates)
    return able and is_plain_matrix(base)


def learn_here(updates: Sequence[ActiveUpdate], base: Tensor) -> bool:
    """Whether at least one parameter is trained and all are on the device of the base, in at least 32 bits.

    Parameters that are sharded, replicated or offloaded do not qualify, and neither do inactive updates.
    """
    learns = False
    for active in updates:
        for number in active.update._parameters.values():
            if type(number) is not nn.Parameter or number.device != base.device:
                return False
            if number.dtype.itemsize < 4 or active.update.inactive:
                return False
            learns |= number.requires_grad
    return learns


def kind_of(active: ActiveUpdate) -> tuple[Any, ...]:
    """Return everything that updates must have in common to be built together, except their rows."""
    update: Any = active.update
    learns = [(number.dtype, number.requires_grad) for number in (update.coefficients, update.locations)]
    return update.shape, update.scale, update.difference, active.strength, *learns, *_owners(update)


def _owners(update: Spectrum) -> tuple[int, ...]:
    """Identify the FSDP 2 unit that has the update's parameters, by the hook that it registers; empty without FSDP 2.

    FSDP 2 reduces the gradients of a unit as soon as the backward pass has left it and misses later ones, so the gradients
    of one unit must not wait for those of another.
    """
    return tuple(map(id, update._state_dict_pre_hooks.values()))


def range_of(active: ActiveUpdate) -> tuple[int, int] | None:
    rows = active.rows
    assert not isinstance(rows, Tensor)
    return None if rows is None else (rows.start, rows.stop)


def groups_of(updates: Sequence[ActiveUpdate]) -> list[list[int]]:
    """Group the indices of one weight's updates such that the updates of a group are of one kind and share no rows."""
    groups: list[list[int]] = []
    for i, one in enumerate(updates):
        group = next((group for group in groups if _joins(one, [updates[j] for j in group])), None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


def _joins(one: ActiveUpdate, others: Sequence[ActiveUpdate]) -> bool:
    return kind_of(one) == kind_of(others[0]) and not any(_overlap(range_of(one), range_of(other)) for other in others)


def _overlap(one: tuple[int, int] | None, other: tuple[int, int] | None) -> bool:
    return one is None or other is None or (one[0] < other[1] and other[0] < one[1])
