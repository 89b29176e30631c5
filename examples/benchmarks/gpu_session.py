"""A run under a time limit: work starts only if enough time is left, results are saved early, and no failure ends the run."""

from __future__ import annotations

import gc
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

Found = dict[str, Any]
LEFT_OUT, ERROR = "left out", "error"
LAST_LINES = 12
DRY_SPEEDUP = 20  # of tiny models


class Budget:
    """A time budget that starts now."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()


@dataclass
class Session:
    """The state that all parts share.

    Args:
        budget: the time budget of the whole run.
        write: writes the results so far.
        dry: whether everything is tiny, to try the script rather than measure.
        rounds: turns of each contender, if time allows.
    """

    budget: Budget
    write: Callable[[], None]
    dry: bool
    rounds: int
    _names: list[str] = field(default_factory=list)

    def attempt(self, place: Found, name: str, seconds: float, work: Callable[[Found], None]) -> bool:
        """Let `work` fill `place[name]` if its estimated seconds are left, and return whether it finished.

        If it did not, the reason is stored next to its results: no time, a missing package, or an error and its last lines.
        """
        found: Found = place.setdefault(name, {})
        self._names.append(name)
        started = time.monotonic()
        try:
            if self.budget.left < (expected := seconds / DRY_SPEEDUP if self.dry else seconds):
                found[LEFT_OUT] = f"no time: expected {expected:.0f} s, {max(0.0, self.budget.left):.0f} s were left"
            else:
                self.guarded(found, lambda: work(found))
                found["seconds taken"] = round(time.monotonic() - started, 2)
            self._tell(found)
        finally:
            self._names.pop()
        return failure(found) is None

    def guarded(self, found: Found, work: Callable[[], object]) -> bool:
        """Call `work`, record any failure in `found`, and return whether there was none."""
        try:
            work()
        except ModuleNotFoundError as error:
            found[LEFT_OUT] = f"{error.name} is missing"
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            found[ERROR] = message[:500]
            found["traceback"] = _last_lines(error)
        if failure(found) is not None:
            tidy()  # frees what it had on the GPU
        return failure(found) is None

    def _tell(self, found: Found) -> None:
        why = failure(found)
        if why is not None:
            print(f"{', '.join(self._names)}: {why[:200]}", flush=True)


def _last_lines(error: Exception) -> list[str]:
    """Return the last lines of the traceback, with the private part of file paths removed."""
    lines = "".join(traceback.format_exception(error)).splitlines()[-LAST_LINES:]
    return [re.sub(r'File ".*?([^/\\"]+[/\\][^/\\"]+)"', r'File "\1"', line) for line in lines]


def failure(found: Found) -> str | None:
    """Return why this work was not done or not finished, or None if it was."""
    if LEFT_OUT in found:
        return f"{LEFT_OUT}: {found[LEFT_OUT]}"
    return f"failed: {found[ERROR]}" if ERROR in found else None


def failures(found: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield names and reasons of all work in a run's results that was not finished."""
    if isinstance(found, dict):
        why = failure(found)
        if why is not None:
            yield name, why
        for key, value in found.items():
            yield from failures(value, f"{name}, {key}" if name else key)


def tidy() -> None:
    """Free memory that is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
