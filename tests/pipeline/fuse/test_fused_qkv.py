"""Fusing: fused query, key and value projections."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.fusing import weights_of
from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    Made,
    assert_near,
    expected,
    facts,
)


def fused_layers(pipe: Any) -> None:
    pipe.unet.fuse_qkv_projections()
    assert pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_qkv is not None


ORDERS = {
    "stacked first": ("stack", "fuse", "unfuse", "unstack"),
    "fused first": ("fuse", "stack", "unfuse", "unstack"),
    "stacked first, unstacked first": ("stack", "fuse", "unstack", "unfuse"),
    "fused first, unstacked first": ("fuse", "stack", "unstack", "unfuse"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_fusing_goes_with_stacked_projections(order: str, dtype: torch.dtype, a: Made, b: Made) -> None:
    pipe = stable_diffusion().to(dtype)
    base = facts(pipe)
    pipe.load_loca_weights(a.state(), "a")
    pipe.load_loca_weights(b.state(), "b")
    pipe.set_loca_adapters(["a", "b"], [0.5, 0.25])
    shown, wanted = picture(pipe), expected((a, 0.5), (b, 0.25), make=lambda: stable_diffusion().to(dtype))
    for step in ORDERS[order]:
        {
            "stack": lambda: fused_layers(pipe),
            "unstack": pipe.unet.unfuse_qkv_projections,
            "fuse": pipe.fuse_loca,
            "unfuse": pipe.unfuse_loca,
        }[step]()
        assert_near(picture(pipe), wanted, 1e-5 if dtype == torch.float32 else 0.1)
    assert torch.equal(picture(pipe), shown)
    pipe.unload_loca_weights()
    assert torch.equal(picture(pipe), base["picture"])
    weights = weights_of(pipe)
    assert all(torch.equal(weights[key], value) for key, value in base["tensors"].items())


def test_stacked_projections_are_restored_too(pipe: Any) -> None:
    fused_layers(pipe)
    stacks = {key: value for key, value in weights_of(pipe).items() if "to_qkv" in key or "to_kv" in key}
    assert len(stacks) == 10
    pipe.fuse_loca()
    changed = weights_of(pipe)
    assert not any(torch.equal(changed[key], value) for key, value in stacks.items())
    pipe.unfuse_loca()
    restored = weights_of(pipe)
    assert all(torch.equal(restored[key], value) for key, value in stacks.items())


def test_stacks_made_of_fused_weights_are_restored_to_what_these_were(pipe: Any) -> None:
    base = stable_diffusion()
    fused_layers(base)
    pipe.fuse_loca()
    fused_layers(pipe)
    pipe.unfuse_loca()
    weights = weights_of(pipe)
    for key, value in weights_of(base).items():
        assert torch.equal(weights[key], value), key
