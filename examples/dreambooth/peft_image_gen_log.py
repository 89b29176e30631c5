"""Measurements taken during a run, in an append-only file: a resumed run adds to it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

START = "start"  # the stage that covers a whole start of the run


class Log:
    """A log of JSON lines. Of two entries for the same step, the later one counts; an incomplete last line is dropped.

    Args:
        file: the log file, created if it is missing.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._began = file, time.perf_counter()
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines[:-1]]
        if lines and lines[-1]:
            file.write_bytes(b"\n".join([*lines[:-1], b""]))

    def add(self, **entry: Any) -> None:
        """Add one line and close the file, so that a crash of the process right afterwards does not lose it."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as out:
            out.write(json.dumps(entry).encode() + b"\n")
        self.entries.append(entry)

    def by_step(self, key: str) -> dict[int, dict[str, Any]]:
        """Return the entries that have a key, by their step."""
        return {entry["step"]: entry for entry in self.entries if key in entry}

    def last(self, key: str) -> dict[str, Any]:
        """Return the latest entry that has a key, or an empty dict if there is none."""
        return next((entry for entry in reversed(self.entries) if key in entry), {})

    def first(self, key: str) -> dict[str, Any]:
        """Return the earliest entry that has a key, or an empty dict if there is none."""
        return next((entry for entry in self.entries if key in entry), {})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Log how long a stage took, even if it raises an error."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage=name, seconds=time.perf_counter() - began)

    def seconds(self, *stages: str) -> float:
        """Return the total seconds of these stages over all starts of the run."""
        return float(sum(entry["seconds"] for entry in self.entries if entry.get("stage") in stages))

    def total(self) -> float:
        """Return the seconds of all starts of the run, including the current one until now."""
        return self.seconds(START) + time.perf_counter() - self._began


class Meter:
    """Measure seconds and memory of each training step. The benchmark defines memory as what torch has reserved on the GPU.

    Args:
        log: the log to write to.
        device: the device of training; if it is not a GPU, memory is 0.
    """

    def __init__(self, log: Log, device: torch.device) -> None:
        self.log, self.gpu = log, device.type == "cuda"
        self._step: int | None = None
        self._began = 0.0

    def begin(self, step: int) -> None:
        """Begin a step and end the one before.

        Args:
            step: the number of the step, from 1 up.
        """
        if self._step is None and self.gpu:  # memory of the encoding does not count as training
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.end()
        self._step, self._began = step, time.perf_counter()

    def end(self) -> None:
        """End the current step; what follows, such as drawing pictures, does not count as training."""
        if self._step is None or not self._began:
            return
        self.log.add(
            step=self._step,
            seconds=time.perf_counter() - self._began,
            allocated=torch.cuda.memory_allocated() if self.gpu else 0,
            reserved=torch.cuda.memory_reserved() if self.gpu else 0,
            peak=torch.cuda.max_memory_reserved() if self.gpu else 0,
        )
        self._began = 0.0

    def forget_pictures(self) -> None:
        """Release the memory used for pictures, so that it does not count as a peak."""
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
