"""The updates of one weight, and of a weight that is fused from several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from loca_vision.functional.row_linear import Rows, rows_on
from loca_vision.layers.active_updates import ActiveUpdate
from loca_vision.layers.built_together import BuiltTogether
from loca_vision.layers.call_settings import CallSettings, Unscaled
from loca_vision.layers.effective_weight import EffectiveWeight
from loca_vision.methods.update import Update


@dataclass(frozen=True)
class AdapterSlot:
    """The adapter that an update belongs to, the projection it changes, and that projection's rows of the weight."""

    adapter: str
    projection: str
    rows: Rows


_DEFAULT = Unscaled()


class WeightUpdates(EffectiveWeight):
    """The updates of the weight of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.updates = nn.ModuleList()
        self.slots: list[AdapterSlot] = []  # one for each update
        self.strengths: dict[str, float] = {}  # of the active adapters
        self.hosts = False  # whether a store has adapters for the weight
        self._together: BuiltTogether | None = None
        self._shared_settings: tuple[CallSettings] = (_DEFAULT,)  # a tuple, so that nn.Module does not register it as a child

    @property
    def call_settings(self) -> CallSettings:
        return self._shared_settings[0]

    def share(self, settings: CallSettings) -> None:
        """Use the call settings of the model."""
        self._shared_settings = (settings,)

    def build_with(self, together: BuiltTogether) -> None:
        """Let the updates be built together with others of the model."""
        self._together = together

    @property
    def together(self) -> BuiltTogether | None:
        return self._together

    def stacked(self) -> Sequence[tuple[WeightUpdates, slice | None]]:
        return [(self, None)]

    def refresh(self) -> None:
        self._forget_batches()
        super().refresh()

    def entries(self) -> list[tuple[AdapterSlot, Update]]:
        return list(zip(self.slots, self.updates, strict=True))  # type: ignore[arg-type]

    def active_updates(self) -> list[ActiveUpdate]:
        if not self.strengths:
            return []
        updates: Any = self.updates._modules.values()  # faster than iterating the ModuleList, and this runs at every call
        return [
            ActiveUpdate(slot.projection, _where(slot, update), update, self.strengths[slot.adapter])
            for slot, update in zip(self.slots, updates, strict=True)
            if slot.adapter in self.strengths and not update.inactive
        ]

    def all_updates(self) -> list[Update]:
        return list(self.updates)  # type: ignore[arg-type]

    def add(self, slot: AdapterSlot, update: Update) -> None:
        self.updates.append(update.train(self.training))
        self.slots.append(slot)
        self._forget_batches()

    def rename(self, adapter: str, new: str) -> None:
        self.slots = [replace(slot, adapter=new) if slot.adapter == adapter else slot for slot in self.slots]
        self.strengths = {new if name == adapter else name: strength for name, strength in self.strengths.items()}

    def discard(self, adapter: str) -> None:
        kept = [(slot, update) for slot, update in self.entries() if slot.adapter != adapter]
        self.slots = [slot for slot, _ in kept]
        self.updates = nn.ModuleList(update for _, update in kept)
        self.strengths.pop(adapter, None)
        self._cached = None
        self._forget_batches()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WeightUpdates:
        self._forget_batches()  # freed memory may soon hold other numbers at the same address and version
        super()._apply(fn, recurse)
        return self

    def _forget_batches(self) -> None:
        if self._together is not None:
            self._together.forget()


def _where(slot: AdapterSlot, update: Update) -> Rows:
    """Return the rows of the slot; if they are an index tensor, it is on the device of the update."""
    held = next(iter(update.tensors()), None) if isinstance(slot.rows, Tensor) else None
    return slot.rows if held is None else rows_on(slot.rows, held.device)


class FusedUpdates(EffectiveWeight):
    """The same updates for a weight that stacks the weights of several layers, as `fuse_qkv_projections` makes it.

    Args:
        parts: the updates of each stacked weight and its rows in the stack; empty if the layer has no such weights.
    """

    def __init__(self, parts: Sequence[tuple[WeightUpdates, slice]]) -> None:
        super().__init__()
        self.parts = tuple(parts)  # a tuple, because the updates are children of other modules

    @property
    def call_settings(self) -> CallSettings:
        return self.parts[0][0].call_settings if self.parts else _DEFAULT

    def active_updates(self) -> list[ActiveUpdate]:
        return [
            ActiveUpdate(active.projection, rows, active.update, active.strength)
            for updates, rows in self.parts
            for active in updates.active_updates()
        ]

    @property
    def together(self) -> BuiltTogether | None:
        return self.parts[0][0].together if self.parts else None

    def stacked(self) -> Sequence[tuple[WeightUpdates, slice | None]]:
        return self.parts

    def all_updates(self) -> list[Update]:
        return [update for updates, _ in self.parts for update in updates.all_updates()]
