"""Fusing and hot swapping: refused calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from loca_vision.methods.update import Update
from loca_vision.pipeline import fuse as fusing
from support.fusing import BOTH, Failing, assert_equal, weights_of
from support.pipelines import stable_diffusion
from support.reference_weights import (
    Made,
    adapter,
    assert_same,
    facts,
)


def huge(component: str) -> Made:
    """Finite as an update, but not in float16."""
    made = adapter(stable_diffusion(), BOTH, size=0.01)
    key = next(key for key in made.tensors if key.startswith(f"{component}.") and key.endswith("coefficients"))
    return made.with_tensors(**{key: made.tensors[key] + 1e6})


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_safe_fusing_refuses_overflow_before_anything_is_written(component: str, a: Made) -> None:
    pipe = stable_diffusion().to(torch.float16)
    pipe.load_loca_weights(a.state(), "a")
    pipe.load_loca_weights(huge(component).state(), "huge")
    pipe.set_loca_adapters("a")
    before = facts(pipe)
    words = r"\.q: merged, the weight would not be finite in torch\.float16"
    with pytest.raises(ValueError, match=words):
        pipe.fuse_loca(adapter_names=["huge", "a"], safe_fusing=True)
    assert_same(pipe, before)
    pipe.fuse_loca(safe_fusing=True)
    fused = facts(pipe)
    with pytest.raises(ValueError, match=words):
        pipe.fuse_loca(adapter_names=["huge"], safe_fusing=True)
    assert_same(pipe, fused)
    pipe.unfuse_loca()
    assert_same(pipe, before)


def test_without_it_infinity_is_written_and_taken_out_again() -> None:
    pipe = stable_diffusion().to(torch.float16)
    base = weights_of(pipe)
    pipe.load_loca_weights(huge("unet").state())
    pipe.fuse_loca()
    assert not all(value.isfinite().all() for value in weights_of(pipe).values())
    pipe.unfuse_loca()
    pipe.unload_loca_weights()
    assert_equal(pipe, base)


def test_a_quantised_weight_is_refused_and_no_other_written(pipe: Any) -> None:
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_v
    layer.weight = nn.Parameter(layer.weight.mul(100).to(torch.int8), requires_grad=False)
    before = weights_of(pipe)
    with pytest.raises(
        ValueError, match=r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn2\.to_v is a Linear without a plain"
    ):
        pipe.fuse_loca()
    assert pipe.num_fused_locas == 0
    assert_equal(pipe, before)


@pytest.mark.parametrize("at", [1, 4, 20, 24])
@pytest.mark.parametrize("fused", [False, True], ids=["nothing fused before", "another fused before"])
def test_a_fuse_that_fails_half_way_changes_nothing(fused: bool, at: int, two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if fused:
        two.fuse_loca(adapter_names=["b"])
    before = facts(two)
    failing = Failing(Update.forward, at)
    with monkeypatch.context() as patch:
        patch.setattr(Update, "forward", lambda *args, **named: failing(*args, **named))
        with pytest.raises(RuntimeError, match="no memory left"):
            two.fuse_loca(adapter_names=["a"])
    assert_same(two, before)
    two.unload_loca_weights()
    assert_equal(two, weights_of(stable_diffusion()))


@pytest.mark.parametrize("at", [1, 2])
def test_a_component_that_cannot_be_fused_leaves_the_other(at: int, two: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    two.fuse_loca(adapter_names=["b"])
    before = facts(two)
    with monkeypatch.context() as patch:
        patch.setattr(fusing, "_fuse", Failing(fusing._fuse, at))
        with pytest.raises(RuntimeError, match="no memory left"):
            two.fuse_loca(adapter_names=["a"])
    assert_same(two, before)
