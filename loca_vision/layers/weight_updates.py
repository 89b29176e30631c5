"""The updates of one weight, and of a fused one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from loca_vision.functional.row_linear import Rows
from loca_vision.layers.call_settings import CallSettings
from loca_vision.layers.effective_weight import ActiveUpdate, EffectiveWeight
from loca_vision.methods.update import Update


@dataclass(frozen=True)
class AdapterSlot:
    """Whose an update is, which projection it changes, and the rows of the weight that make up that projection."""

    adapter: str
    projection: str
    rows: Rows


_USUAL = CallSettings()  # of models that know no strength of a call


class WeightUpdates(EffectiveWeight):
    """The updates of the weight of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = nn.ModuleList()
        self.places: list[AdapterSlot] = []  # one for each update
        self.strengths: dict[str, float] = {}  # of the adapters that act
        self.shared = (_USUAL,)  # in a tuple, which nn.Module does not take for a child

    @property
    def circumstances(self) -> CallSettings:
        return self.shared[0]

    def entries(self) -> list[tuple[AdapterSlot, Update]]:
        return list(zip(self.places, self.updates, strict=True))  # type: ignore[arg-type]

    def active_updates(self) -> list[ActiveUpdate]:
        return [
            ActiveUpdate(place.projection, place.rows, update, self.strengths[place.adapter])
            for place, update in self.entries()
            if place.adapter in self.strengths and not update.inactive
        ]

    def all_updates(self) -> list[Update]:
        return list(self.updates)  # type: ignore[arg-type]

    def add(self, place: AdapterSlot, update: Update) -> None:
        self.updates.append(update)
        self.places.append(place)

    def discard(self, adapter: str) -> None:
        kept = [(place, update) for place, update in self.entries() if place.adapter != adapter]
        self.places = [place for place, _ in kept]
        self.updates = nn.ModuleList(update for _, update in kept)
        self.strengths.pop(adapter, None)
        self._kept = None


class FusedUpdates(EffectiveWeight):
    """The same updates for a weight made by stacking those of several layers, as `fuse_qkv_projections` makes it.

    Args:
        parts: the updates of each stacked weight and the rows it has in the stack.
    """

    def __init__(self, parts: Sequence[tuple[WeightUpdates, slice]]) -> None:
        super().__init__()
        self.parts = tuple(parts)  # in a tuple: they are children elsewhere

    @property
    def circumstances(self) -> CallSettings:
        return self.parts[0][0].circumstances

    def active_updates(self) -> list[ActiveUpdate]:
        return [
            ActiveUpdate(one.projection, rows, one.update, one.strength)
            for updates, rows in self.parts
            for one in updates.active_updates()
        ]

    def all_updates(self) -> list[Update]:
        return [update for updates, _ in self.parts for update in updates.all_updates()]
