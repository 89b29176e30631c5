"""What is measured while a run goes on, in a file to which lines are added: a run that is resumed adds to it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

START = "start"  # the stage that is a whole start of a run


class Log:
    """Lines of JSON. Of two about the same step the later counts; a last line that was cut off does not.

    Args:
        file: made where it is missing.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._began = file, time.perf_counter()
        lines = file.read_bytes().split(b"\n") if file.exists() else []
        self.entries: list[dict[str, Any]] = [json.loads(line) for line in lines[:-1]]
        if lines and lines[-1]:
            file.write_bytes(b"\n".join([*lines[:-1], b""]))

    def add(self, **entry: Any) -> None:
        """One line, which a crash right afterwards does not lose."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as out:
            out.write(json.dumps(entry).encode() + b"\n")
        self.entries.append(entry)

    def by_step(self, key: str) -> dict[int, dict[str, Any]]:
        """The entries that have a key, by their step."""
        return {entry["step"]: entry for entry in self.entries if key in entry}

    def last(self, key: str) -> dict[str, Any]:
        """The latest entry that has a key; empty if there is none."""
        return next((entry for entry in reversed(self.entries) if key in entry), {})

    def first(self, key: str) -> dict[str, Any]:
        """The earliest entry that has a key; empty if there is none."""
        return next((entry for entry in self.entries if key in entry), {})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note how long this took, however it ended."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.add(stage=name, seconds=time.perf_counter() - began)

    def seconds(self, *stages: str) -> float:
        """Of these stages, over all starts of the run."""
        return float(sum(entry["seconds"] for entry in self.entries if entry.get("stage") in stages))

    def total(self) -> float:
        """Seconds of all starts, of which each is a stage of that name, with this one until now."""
        return self.seconds(START) + time.perf_counter() - self._began


class Meter:
    """Seconds and memory of each training step: what the benchmark calls memory is what torch has reserved on the GPU.

    Args:
        log: written to.
        device: of training; of one that is not a GPU memory is 0.
    """

    def __init__(self, log: Log, device: torch.device) -> None:
        self.log, self.gpu = log, device.type == "cuda"
        self._step: int | None = None
        self._began = 0.0

    def begin(self, step: int) -> None:
        """A step begins, and with it the one before has ended.

        Args:
            step: from 1 up.
        """
        if self._step is None and self.gpu:  # what encoding took is not of training
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.end()
        self._step, self._began = step, time.perf_counter()

    def end(self) -> None:
        """The step that has begun is over; what follows, as pictures, is not of training."""
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
        """The memory that pictures took is given back, and is not a peak."""
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
