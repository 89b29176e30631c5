"""A run under a time limit: work is begun while time is left, what it finds is written at once, and no failure ends the run."""

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
    """Seconds from now on."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    @property
    def left(self) -> float:
        return self._end - self._clock()


@dataclass
class Session:
    """What all parts share.

    Args:
        budget: of the whole run.
        write: writes what was found so far.
        dry: everything is tiny, so that the script is tried and nothing is measured.
        rounds: turns of each contender, if time allows.
    """

    budget: Budget
    write: Callable[[], None]
    dry: bool
    rounds: int
    _names: list[str] = field(default_factory=list)

    def attempt(self, place: Found, name: str, seconds: float, work: Callable[[Found], None]) -> bool:
        """Let some work fill `place[name]`, if its estimated seconds are left; whether it came to its end.

        Why it did not is written beside what it had found: no time, a missing package, or an error and its last lines.
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
        """Call `work`; what stops it is noted in `found`."""
        try:
            work()
        except ModuleNotFoundError as error:
            found[LEFT_OUT] = f"{error.name} is missing"
        except Exception as error:
            message = " ".join(f"{type(error).__name__}: {error}".split())
            found[ERROR] = message[:500]
            found["traceback"] = _last_lines(error)
        if failure(found) is not None:
            tidy()  # of what it had on the GPU
        return failure(found) is None

    def _tell(self, found: Found) -> None:
        why = failure(found)
        if why is not None:
            print(f"{', '.join(self._names)}: {why[:200]}", flush=True)


def _last_lines(error: Exception) -> list[str]:
    """Of its traceback; whose folders the files lie in is nobody's business."""
    lines = "".join(traceback.format_exception(error)).splitlines()[-LAST_LINES:]
    return [re.sub(r'File ".*?([^/\\"]+[/\\][^/\\"]+)"', r'File "\1"', line) for line in lines]


def failure(found: Found) -> str | None:
    """Why this work was not done, or not to its end."""
    if LEFT_OUT in found:
        return f"{LEFT_OUT}: {found[LEFT_OUT]}"
    return f"failed: {found[ERROR]}" if ERROR in found else None


def failures(found: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and reasons of all that was not done, in what a run found."""
    if isinstance(found, dict):
        why = failure(found)
        if why is not None:
            yield name, why
        for key, value in found.items():
            yield from failures(value, f"{name}, {key}" if name else key)


def tidy() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
