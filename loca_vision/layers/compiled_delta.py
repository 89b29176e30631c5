"""The update of one weight for compiled code: a buffer that is rewritten in place, so that nothing is recompiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.functional.row_linear import add_rows
from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.layers.active_updates import ActiveUpdate, deltas_of
from loca_vision.methods.update import Update


class CompiledDelta(nn.Module):
    """The buffer `delta` (n, q): `settle` creates it when code is traced, and `refresh` rewrites it when adapters change.

    It holds the updates without the scale of the call, which compiled code multiplies in. While it is None, compiled code
    builds the updates in its graph.
    """

    delta: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("delta", None, persistent=False)
        # the weight that `delta` was made for, in a tuple because it is another module's parameter
        self._settled_for: tuple[Tensor] | None = None
        self.register_load_state_dict_post_hook(_refresh_after_loading)  # type: ignore[no-untyped-call]

    def active_updates(self) -> list[ActiveUpdate]:
        """Return the updates that act on the weight now."""
        raise NotImplementedError

    def all_updates(self) -> list[Update]:
        """Return all updates of the weight, active or not."""
        raise NotImplementedError

    def learns(self) -> bool:
        """Whether training can change any of the updates; if so, compiled code builds them in its graph."""
        return any([update.learns() for update in self.all_updates()])

    def settle(self, base: Tensor) -> None:
        """Create the buffer for a weight like `base` (n, q) unless it already exists."""
        if self.delta is None:
            with ordinary_tensors():
                dtype = base.dtype if base.element_size() > 1 else torch.float32  # 8-bit floats are for storage only
                self.delta = torch.zeros(base.shape, dtype=dtype, device=base.device)
                self._settled_for = (base,)
                self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Rewrite the buffer in place after adapters were added, removed or changed."""
        if self.delta is None:
            return
        wide = torch.zeros(self.delta.shape, device=self.delta.device)
        base = self._settled_for[0] if self._settled_for else self.delta
        deltas = deltas_of(self.active_updates(), base, None, self.delta.device)
        self.delta.copy_(add_rows(wide, deltas) if deltas else wide)

    def drop(self) -> None:
        """Release the buffer."""
        if self.delta is not None:
            self.delta = None
            self._settled_for = None

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_settled_for": None}  # a copy or an unpickled object creates its own
        return state | {"_buffers": state["_buffers"] | {"delta": None}}


def _refresh_after_loading(updates: nn.Module, keys: Any) -> None:
    """Refresh the buffer after `load_state_dict`, because compiled code would not notice the new values."""
    updates.refresh()  # type: ignore[operator]
