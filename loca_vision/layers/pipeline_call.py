"""The current pipeline call of this thread or task, and its scale."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class PipelineCall:
    """One call of a pipeline. It holds identities rather than objects, so that remembering a call keeps nothing alive.

    Args:
        pipe: the identity of the pipeline.
        scale: how strongly all adapters of the pipeline act.
        mappings: the identities of the keyword arguments for attention that the caller passed.
    """

    pipe: int
    scale: float = 1.0
    mappings: frozenset[int] = frozenset()


_CURRENT: ContextVar[PipelineCall | None] = ContextVar("loca_pipeline_call", default=None)
_UNDER_WAY: set[PipelineCall] = set()  # in all threads


def current_call() -> PipelineCall | None:
    """Return the innermost running pipeline call of this thread or task, or None."""
    return _CURRENT.get()


def scale_of_the_call() -> float:
    """Return the scale of the current pipeline call, or 1.0 if there is none."""
    call = _CURRENT.get()
    return 1.0 if call is None else call.scale


@contextmanager
def under_way(call: PipelineCall) -> Iterator[None]:
    """Make this the current pipeline call inside the context."""
    token = _CURRENT.set(call)
    _UNDER_WAY.add(call)
    try:
        yield
    finally:
        _UNDER_WAY.discard(call)
        _CURRENT.reset(token)


def is_from_another_call(mapping: object) -> bool:
    """Whether keyword arguments were passed to a call in another thread, and not to the current one.

    diffusers stores them on the pipeline, where a second thread that calls the same pipeline overwrites them.
    """
    mine = _CURRENT.get()
    if mine is None or id(mapping) in mine.mappings:
        return False
    return any(id(mapping) in call.mappings for call in tuple(_UNDER_WAY))


def other_calls_of(pipe: int) -> Collection[PipelineCall]:
    """Return the other running calls of the same pipeline."""
    return [call for call in tuple(_UNDER_WAY) if call.pipe == pipe and call is not _CURRENT.get()]


_LISTENERS: list[Callable[[], None]] = []
_announced = False


def announce_settings() -> None:
    """Notify all listeners that a model has call settings, so that the scale of pipeline calls matters from now on."""
    global _announced
    _announced = True
    for listener in tuple(_LISTENERS):
        listener()


def listen(listener: Callable[[], None]) -> None:
    """Call `listener` whenever a model gets call settings, and immediately if one already has."""
    if listener not in _LISTENERS:
        _LISTENERS.append(listener)
    if _announced:
        listener()


def stop_listening(listener: Callable[[], None]) -> None:
    if listener in _LISTENERS:
        _LISTENERS.remove(listener)
