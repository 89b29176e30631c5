"""An effective weight, cached until one of its inputs changes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loca_vision.functional.snapshot import Snapshot


class CachedWeight:
    """A weight and a snapshot of its inputs: updates are compared by value, W by a sample of its values."""

    def __init__(self, base: Tensor | None, learned: list[Tensor], terms: tuple[Any, ...], weight: Tensor) -> None:
        self.snapshot = Snapshot([base, *learned], [*_sample(base), *learned])
        self.terms, self.weight = terms, weight

    def holds_for(self, base: Tensor | None, learned: list[Tensor], terms: tuple[Any, ...]) -> bool:
        return self.terms == terms and self.snapshot.holds_for([base, *learned], [*_sample(base), *learned])


def _sample(base: Tensor | None) -> list[Tensor]:
    """Return about 64 values spread over W (p, q)."""
    return [] if base is None else [base[:: max(1, base.shape[0] // 8), :: max(1, base.shape[1] // 8)]]
