"""Adapters of a whole pipeline on a device, against pictures that a plain pipeline draws on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loca_vision import adapters
from support.accelerator import pretended
from support.loader import BOTH
from support.pipelines import picture, stable_diffusion
from support.reference_weights import Made, adapter, expected, merged, models
from support.tolerance import STEPS, assert_near

Expected = Callable[..., torch.Tensor]


@pytest.fixture(scope="module")
def first() -> Made:
    return adapter(stable_diffusion(), BOTH, seed=1, name="first")


@pytest.fixture(scope="module")
def second() -> Made:
    return adapter(stable_diffusion(), {"unet": ("k", "v", "out"), "text_encoder": ("q",)}, seed=2, scale=0.7, n=20)


@pytest.fixture
def pipe(accelerator: torch.device) -> Any:
    return stable_diffusion().to(accelerator)


def assert_drawn(pipe: Any, *terms: Any, **call: Any) -> None:
    """The picture is that of a pipeline on the CPU with the terms in its weights; the steps of a pipeline add up rounding."""
    with pretended(False):
        wanted = expected(*terms)
    assert_near(picture(pipe, **call), wanted, STEPS)


def devices(pipe: Any) -> set[str]:
    """Of everything that the adapters are made of."""
    updates = [update for model in models(pipe).values() if model is not pipe.vae for update in adapters(model, "a").values()]
    return {tensor.device.type for update in updates for tensor in update.tensors()}


def test_loaded_weighed_and_unloaded(pipe: Any, accelerator: torch.device, first: Made, second: Made) -> None:
    base = picture(pipe)
    pipe.load_loca_weights(first.state(), "a")
    assert devices(pipe) == {accelerator.type}
    assert_drawn(pipe, (first, 1.0))
    pipe.load_loca_weights(second.state(), "b")
    pipe.set_loca_adapters(["a", "b"], [0.5, 0.25])
    assert_drawn(pipe, (first, 0.5), (second, 0.25))
    assert_drawn(pipe, (first, 0.25), (second, 0.125), cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    pipe.disable_loca()
    assert torch.equal(picture(pipe), base)
    pipe.enable_loca()
    assert_drawn(pipe, (first, 0.5), (second, 0.25))
    pipe.unload_loca_weights()
    assert torch.equal(picture(pipe), base)


def test_low_memory(pipe: Any, first: Made, second: Made) -> None:
    pipe.enable_loca_low_memory()
    pipe.load_loca_weights(first.state(), "a")
    pipe.load_loca_weights(second.state(), "b")
    pipe.set_loca_adapters(["a", "b"], [0.5, 0.25])
    assert_drawn(pipe, (first, 0.5), (second, 0.25))
    assert_drawn(pipe, (first, 1.0), (second, 0.5), cross_attention_kwargs={"scale": 2.0})


def test_hot_swap_keeps_the_tensors(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state(), "a")
    held = [id(value) for update in adapters(pipe.unet, "a").values() for value in update.tensors()]
    assert_drawn(pipe, (first, 1.0))
    for seed in (3, 4):
        other = adapter(stable_diffusion(), BOTH, seed=seed, scale=-0.5)
        pipe.load_loca_weights(other.state(), "a", hotswap=True)
        assert [id(value) for update in adapters(pipe.unet, "a").values() for value in update.tensors()] == held
        assert_drawn(pipe, (other, 1.0))


def test_fused_projections_and_fused_adapters(pipe: Any, first: Made) -> None:
    """Of the attention layers, and into the weights and out of them again."""
    base = picture(pipe)
    pipe.load_loca_weights(first.state(), "a")
    pipe.unet.fuse_qkv_projections()
    assert_drawn(pipe, (first, 1.0))
    pipe.set_loca_adapters("a", 0.5)
    assert_drawn(pipe, (first, 0.5))
    pipe.unet.unfuse_qkv_projections()
    pipe.set_loca_adapters("a", 1.0)
    assert_drawn(pipe, (first, 1.0))
    pipe.fuse_loca()
    assert_drawn(pipe, (first, 1.0))
    pipe.unfuse_loca()
    pipe.unload_loca_weights()
    assert torch.equal(picture(pipe), base)


def test_moved_saved_and_loaded_again(pipe: Any, accelerator: torch.device, first: Made, tmp_path: Path) -> None:
    pipe.load_loca_weights(first.state(), "a")
    drawn = picture(pipe)
    with pretended(False):
        pipe.to("cpu")
        assert_drawn(pipe, (first, 1.0))
    assert_near(picture(pipe.to(accelerator)), drawn)
    pipe.save_loca_weights(tmp_path, adapter_name="a")
    fresh = stable_diffusion().to(accelerator)
    fresh.load_loca_weights(tmp_path, adapter_name="a")
    assert_near(picture(fresh), drawn)


def test_in_half_precision(pipe: Any, accelerator: torch.device, first: Made) -> None:
    """Weights are rounded once, as those of a pipeline that has the terms in them."""
    pipe.load_loca_weights(first.state(), "a")
    before = {name: update.coefficients.clone() for name, update in adapters(pipe.unet, "a").items()}
    pipe.to(dtype=torch.bfloat16)
    with pretended(False):
        plain = merged((first, 1.0)).to(accelerator, torch.bfloat16)
    assert_near(picture(pipe).float(), picture(plain).float(), 1.0, torch.bfloat16)
    assert all(torch.equal(update.coefficients, before[name]) for name, update in adapters(pipe.unet, "a").items())
