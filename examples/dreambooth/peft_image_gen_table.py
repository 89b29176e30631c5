"""Show the benchmark's result files in one table: peft's, with ours."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loca_vision.messages import aligned, one_line

_HEADS = ("experiment", "test similarity", "drift", "train loss", "trained numbers", "file, MB", "memory, GB", "train time, s")
_LARGEST = 8 * 2**20  # bytes of a result file


@dataclass(frozen=True)
class Row:
    """One run.

    Args:
        similarity: the DINOv2 similarity to held-out images; higher is better.
        drift: how far pictures of other things moved from the base's, from 0 to 1; None if it was not measured.
        memory: the peak memory in bytes.
        ours: whether this is our run, which is marked in the table.
    """

    name: str
    similarity: float
    drift: float | None
    loss: float
    numbers: int
    size: int
    memory: int
    seconds: float
    ours: bool = False

    def cells(self) -> list[str]:
        """Return the cells of the run's row in the table."""
        return [
            f"> {self.name}" if self.ours else self.name,
            f"{self.similarity:.4f}",
            "-" if self.drift is None else f"{self.drift:.4f}",
            f"{self.loss:.4f}",
            f"{self.numbers:,}",
            f"{self.size / 1e6:.2f}",
            f"{self.memory / 1e9:.2f}",
            f"{self.seconds:.0f}",
        ]


def read_row(file: Path, *, ours: bool = False) -> Row | None:
    """Read a result file; return None if the run did not succeed.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not a result of the benchmark.
    """
    with file.open("rb") as opened:
        raw = opened.read(_LARGEST + 1)
    if len(raw) > _LARGEST:
        raise ValueError(f"{file}: expected a result file of at most {_LARGEST:,} bytes, got a larger one")
    try:
        found = json.loads(raw, parse_constant=lambda name: None)  # a full fine-tuning has a drift of NaN
        train, last = found["train_info"], found["train_info"]["metrics"][-1:]
        if train["status"] != "success":
            return None
        return Row(_name(found["run_info"]["experiment_name"]), *_measured(train, last[0]), ours=ours)
    except (KeyError, TypeError, IndexError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: expected a result file of the benchmark, got another ({one_line(error, 100)})") from error


def rows_of(folder: Path) -> tuple[list[Row], list[str]]:
    """Read all result files of a folder; return their rows, and the names of files whose runs did not succeed.

    Raises:
        OSError, ValueError: see `read_row`; also if the folder does not exist or has no result files.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder")
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ValueError(f"{folder}: expected result files, *.json, got none")
    read = [(file.name, read_row(file)) for file in files]
    return [row for _, row in read if row is not None], [name for name, row in read if row is None]


def table(rows: Sequence[Row]) -> str:
    """Return the table, sorted by falling similarity."""
    ordered = sorted(rows, key=lambda row: -row.similarity)
    return aligned([list(_HEADS), *(row.cells() for row in ordered)], str.ljust)


def _name(value: Any) -> str:
    """Return the name of an experiment with only printable characters, so that it is safe to print in a terminal."""
    if not isinstance(value, str):
        raise TypeError(f"experiment_name={value!r}")
    return "".join(letter if letter.isprintable() else "?" for letter in value)[:80]


def _measured(train: Any, last: Any) -> tuple[float, float | None, float, int, int, int, float]:
    drift = last.get("drift")
    return (
        _number(last["test dino_similarity"]),
        None if drift is None else _number(drift),
        _number(last["train loss"]),
        int(_number(train["num_trainable_params"])),
        int(_number(train["file_size"])),
        int(_number(train["accelerator_memory_max"])),
        _number(train["train_time"]),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"expected a number, got {value!r}")
    return float(value)
