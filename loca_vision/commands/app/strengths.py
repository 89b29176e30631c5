"""How strongly adapters act for one request, while others wait: the one place that changes what acts in a shared model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock

from torch import nn

from loca_vision.model.activation import activate
from loca_vision.model.state import Strength, state_of
from loca_vision.model.traversal import unwrap

Strengths = Mapping[str, Strength]


class Acting:
    """Requests of several tabs come in threads, and share one model: each has its own strengths, and the model to itself.

    Args:
        choose: lets exactly these adapters act; none of them where there are none.
    """

    def __init__(self, choose: Callable[[Strengths], None]) -> None:
        self._choose, self._lock = choose, Lock()

    @contextmanager
    def __call__(self, strengths: Strengths) -> Iterator[None]:
        """Inside, exactly these adapters act, and no other request is inside."""
        with self._lock:
            self._choose(strengths)
            yield


def acting_in(model: nn.Module) -> Acting:
    """Of a model by itself, with a strength for each adapter, or one for each of its projections; of none, its own head too."""
    record = state_of(model)
    if record is None:
        raise ValueError(f"{type(model).__name__} has no adapter")

    def choose(strengths: Strengths) -> None:
        activate(unwrap(model), record, dict(strengths), enabled=True)

    return Acting(choose)
