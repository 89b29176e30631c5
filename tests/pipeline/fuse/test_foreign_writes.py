"""Fusing: writes to the weights by other code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from support.fusing import PRECISIONS, assert_equal, weights_of
from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    Made,
    assert_near,
    expected,
)


def add_lora(pipe: Any) -> None:
    torch.manual_seed(21)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "lora")


def test_a_lora_fused_later_stays_when_loca_is_unfused(pipe: Any, base: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    lora = stable_diffusion()
    add_lora(lora)
    lora = picture(lora)
    add_lora(pipe)
    both = picture(pipe)
    pipe.fuse_loca()
    pipe.fuse_lora()
    assert_near(picture(pipe), both)
    pipe.unfuse_loca()
    assert ["had been changed since LoCA was fused" in record.getMessage() for record in caplog.records] == [True]
    assert pipe.fused_locas == set()
    assert_near(picture(pipe), both)
    pipe.unload_loca_weights()
    assert_near(picture(pipe), lora)
    pipe.unfuse_lora()
    assert_near(picture(pipe), lora)
    pipe.unload_lora_weights()
    assert_near(picture(pipe), base)


def test_unloading_loca_keeps_a_lora_fused_later(pipe: Any) -> None:
    lora = stable_diffusion()
    add_lora(lora)
    lora = picture(lora)
    add_lora(pipe)
    pipe.fuse_loca()
    pipe.fuse_lora()
    pipe.unload_loca_weights()
    assert_near(picture(pipe), lora)


def test_once_lora_is_unfused_loca_can_be(pipe: Any, a: Made) -> None:
    add_lora(pipe)
    both = picture(pipe)
    pipe.fuse_loca()
    pipe.fuse_lora()
    pipe.unfuse_lora()
    pipe.unfuse_loca()
    assert_near(picture(pipe), both)
    pipe.unload_lora_weights()
    assert_near(picture(pipe), expected((a, 1.0)))


def test_loca_is_unfused_before_a_lora_that_was_fused_before(pipe: Any, a: Made) -> None:
    add_lora(pipe)
    both = picture(pipe)
    pipe.fuse_lora()
    before = weights_of(pipe)
    pipe.fuse_loca()
    assert_near(picture(pipe), both)
    pipe.unfuse_loca()
    assert_equal(pipe, before)
    pipe.unfuse_lora()
    assert_near(picture(pipe), both)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_a_change_by_hand_outlives_fusing_and_all_else_is_exact(dtype: torch.dtype, a: Made, b: Made) -> None:
    pipe = stable_diffusion().to(dtype)
    base = weights_of(pipe)
    pipe.load_loca_weights(a.state(), "a")
    pipe.load_loca_weights(b.state(), "b")
    pipe.fuse_loca(adapter_names=["a"])
    changed = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    with torch.no_grad():
        pipe.unet.get_parameter(changed)[3, 4] += 1
    pipe.fuse_loca(adapter_names=["b"])
    pipe.unload_loca_weights()
    after = weights_of(pipe)
    wanted = base.pop(f"unet.{changed}").clone()
    wanted[3, 4] += 1
    assert_near(after.pop(f"unet.{changed}").float(), wanted.float(), 16 * torch.finfo(dtype).eps)
    assert all(torch.equal(after[key], value) for key, value in base.items())


def test_the_log_is_silent_where_nothing_was_changed(two: Any, caplog: pytest.LogCaptureFixture) -> None:
    two.fuse_loca()
    two.unfuse_loca()
    two.fuse_loca()
    two.to(torch.float16)
    two.unload_loca_weights()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("loca_vision")] == []
