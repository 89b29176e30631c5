"""Checkpoints to write and inspect in the tests in storage/run_checkpoint/."""

from __future__ import annotations

import random
from pathlib import Path

import torch

from loca_vision.storage.run_checkpoint import write_checkpoint


def write(folder: Path, step: int, keep: int | None = None) -> Path:
    return write_checkpoint(folder, step, {"a": torch.full((50,), float(step))}, {"step": step}, keep=keep)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)
