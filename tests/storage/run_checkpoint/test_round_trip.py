"""Checkpoints of a run: round trips."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from loca_vision.storage.run_checkpoint import read_checkpoint, write_checkpoint
from support.checkpoints import content, write


def test_tensors_come_back_to_the_bit(tmp_path: Path) -> None:
    bits = torch.randint(-(2**63), 2**63 - 1, (6, 8))
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.int8, torch.uint8)
    tensors = {str(kind): bits.view(kind) for kind in kinds} | {"truth": bits > 0, "whole": bits}
    tensors |= {"one": torch.tensor(3), "none": torch.empty(0, 7), "turned": bits.T, "part": bits[2:4, ::2], "same": bits}
    tensors |= {"parameter": torch.nn.Parameter(torch.randn(2)), "spread": torch.zeros(1).expand(3)}
    found, _ = read_checkpoint(write_checkpoint(tmp_path, 1, tensors, {}))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        as_bytes = [t.detach().contiguous().flatten().view(torch.uint8) for t in (found[name], tensor)]
        assert torch.equal(*as_bytes)


def test_state_comes_back_unchanged(tmp_path: Path) -> None:
    draw = random.Random(0)
    floats = [draw.gauss(0, 1) * 10.0 ** draw.randrange(-300, 300) for _ in range(200)]
    state = {
        "floats": [0.1, -0.0, 5e-324, 1.7976931348623157e308, *floats],
        "whole": [0, -1, 2**63, -(2**128), 10**3000],
        "texts": ["", "é😀", "\x00\n\u2028", "\udc80"],
        "other": [None, True, False, {}, [], {"": {"a": [[[[[[[[[1]]]]]]]]]}}],
    }  # fmt: skip
    _, found = read_checkpoint(write_checkpoint(tmp_path, 1, {}, state))
    assert found == state and repr(found) == repr(state)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"step": -1}, "step=-1: expected a whole number"),
        ({"step": True}, "step=True"),
        ({"step": 1.0}, "step=1.0"),
        ({"step": 10**18}, "below 10"),
        ({"keep": 0}, "keep=0: expected a whole number"),
        ({"keep": True}, "keep=True"),
        ({"state": {"a": (1, 2)}}, "state: it would come back changed"),
        ({"state": {1: 2}}, "state: it would come back changed"),
        ({"state": {"a": float("nan")}}, "state: it cannot be kept as JSON"),
        ({"state": {"a": 10**5000}}, "state: it cannot be kept as JSON"),
        ({"state": {"a": torch.zeros(1)}}, "state: it cannot be kept as JSON"),
        ({"state": [1]}, "it is not a table"),
        ({"tensors": {"a": [1]}}, "'a': it is list, not a dense tensor"),
        ({"tensors": {"a": torch.eye(2).to_sparse()}}, "not a dense tensor"),
        ({"tensors": {"a": torch.zeros(1, dtype=torch.complex64)}}, "'a': torch.complex64"),
        ({"tensors": {"a": torch.zeros([1] * 9)}}, "9 axes cannot be"),
        ({"tensors": {"__metadata__": torch.zeros(1)}}, "a tensor's name is a text other"),
        ({"tensors": {1: torch.zeros(1)}}, "1: a tensor's name"),
        ({"tensors": {"a" * 9_000_000: torch.zeros(1)}}, "more than the 8388608 bytes"),
    ],
)  # fmt: skip
def test_what_could_not_be_read_back_is_refused_first(arguments: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    write(tmp_path, 0)
    before = content(tmp_path)
    wanted: dict[str, Any] = {"step": 0, "tensors": {}, "state": {}} | arguments
    with pytest.raises((ValueError, TypeError), match=sentence):
        write_checkpoint(tmp_path, wanted.pop("step"), wanted.pop("tensors"), wanted.pop("state"), **wanted)
    assert content(tmp_path) == before
