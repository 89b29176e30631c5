"""Pipelines, state dicts and a fake hub cache for the tests in formats/sources/."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.reference_weights import (
    FILE_NAME,
    Made,
    assert_same,
)
from support.time_limit import within

PARTS = {"unet": ("q", "v"), "text_encoder": ("q",)}


UNET = {"unet": ("q", "v")}


Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.q"


C, L = f"{Q}.coefficients", f"{Q}.locations"


def assert_refused(still: tuple[Any, dict[str, Any]], error: type[Exception], *words: str, **given: Any) -> str:
    """Try to load, check that the pipeline is unchanged, and return the error message."""
    pipe, before = still
    with within(20), pytest.raises(error) as caught:
        pipe.load_loca_weights(given.pop("source"), **given)
    sentence = str(caught.value)
    for word in words:
        assert word in sentence, sentence
    assert sentence.isprintable() and sentence.count("\n") == 0
    assert_same(pipe, before)
    return sentence


class PathLike:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def folder(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path)
    return path, {}


def file(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    return made.write(path / "any.safetensors"), {}


def subfolder(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path / "a" / "b")
    made.but(format_version=9).write(path)
    return path, {"subfolder": "a/b"}


def about(change: Callable[[dict[str, Any]], object]) -> Callable[[Made], Made]:
    """Apply a change to a copy of the metadata."""

    def broken(made: Made) -> Made:
        fields = json.loads(json.dumps(made.about))
        change(fields)
        return Made(made.tensors, fields)

    return broken


def wide(made: Made) -> Made:
    return made.but(shapes=made.about["shapes"] | {Q: [32, 64]})


class Cache:
    """A repository in a hub cache, in the layout of huggingface_hub."""

    def __init__(self, folder: Path, repository: str) -> None:
        self.top = folder / f"models--{repository.replace('/', '--')}"
        (self.top / "blobs").mkdir(parents=True)
        (self.top / "refs").mkdir()

    def add(self, made: Made, commit: str, name: str = FILE_NAME, *refs: str) -> Path:
        """Put a file into the snapshot of a commit and point the branches `refs` to that commit."""
        blob = self.top / "blobs" / f"{len(list((self.top / 'blobs').iterdir())):064x}"
        made.write(blob.with_suffix(".safetensors")).rename(blob)
        link = self.top / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        for ref in refs:
            (self.top / "refs" / ref).write_text(commit)
        return self.top / "snapshots" / commit
