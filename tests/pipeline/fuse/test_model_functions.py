"""Fusing: the functions for single models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from loca_vision import remove, save_adapter, set_adapters
from support.fusing import assert_equal, weights_of
from support.pipelines import stable_diffusion
from support.reference_weights import (
    Made,
    assert_same,
    facts,
)


@pytest.mark.parametrize("name", [None, "a"])
@pytest.mark.parametrize("merge", [False, True])
def test_what_is_fused_is_neither_removed_nor_merged_again(merge: bool, name: str | None, pipe: Any) -> None:
    pipe.fuse_loca()
    before = facts(pipe)
    with pytest.raises(ValueError, match="adapter 'a' is fused into the weights"):
        remove(pipe.unet, name, merge=merge)
    assert_same(pipe, before)
    pipe.unload_loca_weights()
    assert_equal(pipe, weights_of(stable_diffusion()))


@pytest.mark.parametrize("names", ["a", []], ids=str)
def test_set_adapters_refuses_what_is_fused(names: Any, pipe: Any) -> None:
    pipe.fuse_loca()
    before = facts(pipe)
    with pytest.raises(ValueError, match="fused"):
        set_adapters(pipe.unet, names, 0.5 if names else None)
    assert_same(pipe, before)


def test_a_fused_adapter_is_saved_by_itself(pipe: Any, a: Made, tmp_path: Path) -> None:
    pipe.fuse_loca()
    tensors = safetensors.torch.load_file(save_adapter(pipe.unet, tmp_path, "a"))
    assert all(torch.equal(a.tensors[f"unet.{key}"], value) for key, value in tensors.items())
