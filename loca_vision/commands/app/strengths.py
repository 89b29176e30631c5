"""Set the adapters' strengths for one request while others wait: the only place that changes them in a shared model."""

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
    """Gives each request its own strengths and exclusive use of the model, which requests from several threads share.

    Args:
        choose: activates exactly these adapters, or none if there are none.
    """

    def __init__(self, choose: Callable[[Strengths], None]) -> None:
        self._choose, self._lock = choose, Lock()

    @contextmanager
    def __call__(self, strengths: Strengths) -> Iterator[None]:
        """Activate exactly these adapters inside the `with`, and keep other requests out."""
        with self._lock:
            self._choose(strengths)
            yield


def acting_in(model: nn.Module) -> Acting:
    """Return an `Acting` for a single model, with strengths per adapter or projection; without any, its own head acts."""
    record = state_of(model)
    if record is None:
        raise ValueError(f"{type(model).__name__} has no adapter")

    def choose(strengths: Strengths) -> None:
        activate(unwrap(model), record, dict(strengths), enabled=True)

    return Acting(choose)
