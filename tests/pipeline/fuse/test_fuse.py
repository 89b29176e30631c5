"""Fusing: fuse_loca and unfuse_loca."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from torch import Tensor

from support.fusing import BOTH, CONV_IN, PRECISIONS, UNET, assert_equal, weights_of
from support.pipelines import instruct_pix2pix, picture, quiet, stable_diffusion, stable_diffusion_xl
from support.reference_weights import (
    Made,
    adapter,
    assert_near,
    assert_same,
    expected,
    facts,
    layers,
    merged,
    models,
)


@pytest.mark.parametrize("make", [stable_diffusion, instruct_pix2pix, stable_diffusion_xl])
def test_fused_weights_are_the_updated_ones(make: Callable[[], Any]) -> None:
    pipe = make()
    made = adapter(make(), {component: ("q", "k", "v", "out") for component in models(pipe) if component != "vae"})
    pipe.load_loca_weights(made.state())
    before = facts(pipe)
    pipe.fuse_loca()
    wanted = merged((made, 1.0), make=make)
    for component in made.about["config"]:
        genuine = dict(layers(getattr(wanted, component)))
        for projection, layer in layers(getattr(pipe, component)):
            assert_near(layer.weight.detach(), genuine[projection].weight.detach(), 1e-6)
    assert (pipe.num_fused_locas, pipe.fused_locas) == (1, {"default_0"})
    assert pipe.get_active_loca_adapters() == ["default_0"]
    assert_near(picture(pipe), picture(wanted))
    pipe.unfuse_loca()
    assert_same(pipe, before)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_unfusing_is_bit_exact_however_often(dtype: torch.dtype, a: Made, b: Made) -> None:
    pipe = stable_diffusion().to(dtype)
    base = weights_of(pipe)
    pipe.load_loca_weights(a.state(), "a")
    pipe.load_loca_weights(b.state(), "b")
    pipe.set_loca_adapters(["a", "b"], [0.5, 0.3])
    before, full = facts(pipe), merged((a, 0.25), (b, 0.15))
    for _ in range(3):
        pipe.fuse_loca(scale=0.5)
        for projection, layer in layers(pipe.unet):
            wanted = dict(layers(full.unet))[projection].weight.detach()
            assert layer.weight.dtype == dtype
            assert_near(layer.weight.detach().float(), wanted, 4 * torch.finfo(dtype).eps)
        pipe.unfuse_loca()
        assert_same(pipe, before)
    pipe.fuse_loca()
    pipe.unload_loca_weights()
    assert_equal(pipe, base)


def test_the_weights_are_rounded_once(a: Made) -> None:
    """bfloat16 of W + Delta W; two fuses one after the other round no more than that."""
    pipe = stable_diffusion().to(torch.bfloat16)
    pipe.load_loca_weights(a.state(), "first")
    pipe.load_loca_weights(a.state(), "second")
    pipe.set_loca_adapters(["first", "second"], [0.5, 0.25])
    for name in ("first", "second"):
        pipe.fuse_loca(adapter_names=[name])
    one_by_one = weights_of(pipe)
    pipe.unfuse_loca()
    pipe.fuse_loca()
    assert_equal(pipe, one_by_one)


def test_fusing_twice_is_fusing_once(pipe: Any, a: Made) -> None:
    pipe.fuse_loca(scale=0.5)
    fused = weights_of(pipe)
    for again in ({}, {"scale": 3.0}, {"adapter_names": ["a"]}, {"components": ["unet"]}):
        pipe.fuse_loca(**again)
        assert_equal(pipe, fused)
    assert pipe.num_fused_locas == 1
    assert_near(picture(pipe), expected((a, 0.5)))
    pipe.unfuse_loca()
    assert_near(picture(pipe), expected((a, 1.0)))
    unfused = weights_of(pipe)
    pipe.unfuse_loca()
    assert_equal(pipe, unfused)


@pytest.mark.parametrize("scale", [0.5, -1.0, 0, 2])
def test_the_scale_multiplies_what_was_set(scale: float, two: Any, a: Made, b: Made) -> None:
    shown = picture(two)
    two.fuse_loca(scale=scale)
    assert_near(picture(two), expected((a, 0.5 * scale), (b, 0.25 * scale)))
    two.unfuse_loca()
    assert torch.equal(picture(two), shown)


@pytest.mark.parametrize("scale", [math.nan, math.inf, "1", None, True, [1.0]])
def test_a_scale_is_a_number(scale: Any, pipe: Any) -> None:
    before = facts(pipe)
    with pytest.raises(ValueError, match=r"scale=.*: expected a finite number"):
        pipe.fuse_loca(scale=scale)
    assert_same(pipe, before)


def test_one_of_two_is_fused_and_the_other_acts_unfused(two: Any, a: Made, b: Made) -> None:
    before = facts(two)
    two.fuse_loca(adapter_names=["b"])
    assert two.fused_locas == {"b"}
    assert_near(picture(two), expected((a, 0.5), (b, 0.25)))
    assert_near(picture(two, cross_attention_kwargs={"scale": 0.0}), expected((b, 0.25)))
    two.fuse_loca(adapter_names=["a"])
    assert two.fused_locas == {"a", "b"} and two.num_fused_locas == 2
    assert_near(picture(two), expected((a, 0.5), (b, 0.25)))
    two.unfuse_loca()
    assert_same(two, before)


def test_one_that_rests_is_fused_by_name(two: Any, a: Made, b: Made) -> None:
    two.set_loca_adapters("b", 0.25)
    before = facts(two)
    two.fuse_loca(adapter_names=["a"], scale=0.5)
    assert_near(picture(two), expected((a, 0.5), (b, 0.25)))
    two.unfuse_loca()
    assert_same(two, before)


def test_only_the_active_ones_are_fused(two: Any, a: Made) -> None:
    two.set_loca_adapters("a")
    two.fuse_loca()
    assert two.fused_locas == {"a"}
    assert_near(picture(two), expected((a, 1.0)))
    two.unfuse_loca()
    two.set_loca_adapters([])
    with pytest.raises(ValueError, match="no adapter is active, so there is nothing to fuse; call set_loca_adapters first"):
        two.fuse_loca()


def test_only_some_components(two: Any, a: Made, b: Made) -> None:
    before = facts(two)
    two.fuse_loca(["text_encoder"])
    fused = weights_of(two)
    changed = {key for key, value in before["tensors"].items() if not torch.equal(value, fused[key])}
    assert changed and all(key.startswith("text_encoder.") for key in changed)
    assert_near(picture(two), expected((a, 0.5), (b, 0.25)))
    two.fuse_loca(components=["unet"], scale=2.0)
    unet = {"unet": 2.0, "text_encoder": 1.0}
    scaled = [(made, lambda name, s=s: s * unet[name.partition(".")[0]]) for made, s in ((a, 0.5), (b, 0.25))]
    assert_near(picture(two), expected(*scaled))
    two.unfuse_loca(["unet"])
    assert two.fused_locas == {"a", "b"}
    assert_equal(two, fused)
    two.unfuse_loca(components=("text_encoder", "unet"))
    assert_same(two, before)


@pytest.mark.parametrize(
    ("components", "words"),
    [
        ("unet", r"components='unet': expected a list of names"),
        ([], r"components=\[\]: expected a list of names"),
        (["transformer"], "components: 'transformer' has no adapter; those with adapters are"),
        (["unet", "vae"], "components: 'vae' has no adapter"),
        (["unet", "tokenizer"], "components: 'tokenizer' has no adapter"),
    ],
    ids=str,
)
def test_a_wrong_component_is_refused(components: Any, words: str, pipe: Any) -> None:
    before = facts(pipe)
    with pytest.raises(ValueError, match=words):
        pipe.fuse_loca(components)
    assert_same(pipe, before)
    pipe.fuse_loca()
    fused = facts(pipe)
    with pytest.raises(ValueError, match=words):
        pipe.unfuse_loca(components)
    assert_same(pipe, fused)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["c"], "no adapter 'c' in the pipeline; it has 'a'"),
        (["a", "c"], "no adapter 'c' in the pipeline"),
        (["a", "a"], "an adapter is named twice"),
        ([], "name at least one adapter"),
    ],
    ids=str,
)
def test_a_wrong_name_is_refused(names: Any, words: str, pipe: Any) -> None:
    before = facts(pipe)
    with pytest.raises(ValueError, match=words):
        pipe.fuse_loca(adapter_names=names)
    assert_same(pipe, before)


def test_an_adapter_loaded_later_acts_together_with_a_fused_one(pipe: Any, a: Made, b: Made) -> None:
    pipe.fuse_loca(scale=0.5)
    pipe.load_loca_weights(b.state(), "b")
    assert_near(picture(pipe), expected((a, 0.5), (b, 1.0)))
    pipe.fuse_loca()
    assert pipe.fused_locas == {"a", "b"}
    assert_near(picture(pipe), expected((a, 0.5), (b, 1.0)))
    pipe.unfuse_loca()
    assert_near(picture(pipe), expected((b, 1.0)))


def test_a_call_scales_only_what_is_not_fused(two: Any, a: Made, b: Made) -> None:
    two.fuse_loca(adapter_names=["a"])
    assert_near(picture(two, cross_attention_kwargs={"scale": 2.0}), expected((a, 0.5), (b, 0.5)))
    assert_near(picture(two), expected((a, 0.5), (b, 0.25)))


def test_what_is_fused_cannot_be_weighed_disabled_or_deleted(two: Any) -> None:
    two.fuse_loca(adapter_names=["a"])
    before = facts(two)
    for call in (
        lambda: two.set_loca_adapters("a", 0.3),
        lambda: two.set_loca_adapters(["b", "a"]),
        two.disable_loca,
        lambda: two.delete_loca_adapters("a"),
        lambda: two.delete_loca_adapters(["b", "a"]),
    ):
        with pytest.raises(ValueError, match="adapter 'a' is fused into the weights; call unfuse_loca first"):
            call()
        assert_same(two, before)
    two.delete_loca_adapters("b")
    two.unfuse_loca()
    two.disable_loca()


def test_what_is_disabled_is_not_fused(two: Any) -> None:
    two.disable_loca()
    before = facts(two)
    for given in ({}, {"adapter_names": ["a"]}, {"components": ["unet"]}):
        with pytest.raises(ValueError, match="the adapters are disabled; call enable_loca first"):
            two.fuse_loca(**given)
        assert_same(two, before)


def test_the_base_cannot_be_asked_for_while_something_is_fused(pipe: Any) -> None:
    """An empty list is the base model, and the weights are not the base's."""
    pipe.fuse_loca()
    before = facts(pipe)
    with pytest.raises(ValueError, match="fused"):
        pipe.set_loca_adapters([])
    assert_same(pipe, before)


def test_unloading_what_is_fused_restores_every_bit(a: Made, b: Made) -> None:
    pipe = stable_diffusion()
    before = facts(pipe)
    pipe.load_loca_weights(a.state(), "a")
    pipe.fuse_loca(scale=0.5)
    pipe.load_loca_weights(b.state(), "b")
    pipe.fuse_loca(["unet"])
    pipe.unload_loca_weights()
    assert_same(pipe, before)


def test_a_whole_conv_in_stays_with_what_is_fused(a: Made, base: Tensor) -> None:
    pipe = stable_diffusion()
    before = facts(pipe)
    made = adapter(stable_diffusion(), UNET, whole=CONV_IN)
    pipe.load_loca_weights(made.state())
    pipe.fuse_loca()
    assert_near(picture(pipe), expected((made, 1.0)))
    pipe.unfuse_loca()
    assert_near(picture(pipe), expected((made, 1.0)))
    pipe.fuse_loca()
    pipe.load_loca_weights(a.state(), "a")
    assert_near(picture(pipe), expected((made, 1.0), (a, 1.0)))
    pipe.unload_loca_weights()
    assert_same(pipe, before)


def test_a_copy_of_a_fused_pipeline_is_unfused_by_itself(two: Any) -> None:
    two.fuse_loca()
    fused = facts(two)
    other = copy.deepcopy(two)
    assert other.fused_locas == {"a", "b"}
    other.unload_loca_weights()
    assert_equal(other, weights_of(stable_diffusion()))
    assert_same(two, fused)
    two.unload_loca_weights()
    assert_equal(two, weights_of(stable_diffusion()))


def test_another_pipeline_of_the_components_can_unfuse(pipe: Any, a: Made) -> None:
    base = weights_of(stable_diffusion())
    other = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    pipe.fuse_loca()
    assert other.fused_locas == {"a"}
    other.unfuse_loca()
    assert pipe.num_fused_locas == 0
    assert_near(picture(pipe), expected((a, 1.0)))
    pipe.unload_loca_weights()
    assert_equal(pipe, base)


def test_another_precision_meanwhile(pipe: Any) -> None:
    pipe.fuse_loca()
    pipe.to(torch.bfloat16)
    pipe.unload_loca_weights()
    assert_equal(pipe, weights_of(stable_diffusion().to(torch.bfloat16)))


def test_an_offloaded_unet_is_fused_where_its_weights_are(a: Made, base: Tensor) -> None:
    pipe = stable_diffusion()
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    pipe.load_loca_weights(a.state(), "a")
    assert_near(picture(pipe), expected((a, 1.0)))
    pipe.fuse_loca(scale=0.5)
    assert_near(picture(pipe), expected((a, 0.5)))
    pipe.unfuse_loca()
    assert_near(picture(pipe), expected((a, 1.0)))
    pipe.fuse_loca()
    pipe.unload_loca_weights()
    assert torch.equal(picture(pipe), base)


def test_what_is_saved_while_fused_is_the_fused_base(pipe: Any, a: Made, tmp_path: Path) -> None:
    base = stable_diffusion()
    pipe.fuse_loca()
    pipe.save_pretrained(tmp_path)
    again = quiet(StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None))
    for component, model in models(again).items():
        assert set(model.state_dict()) == set(getattr(base, component).state_dict())
    wanted = merged((a, 1.0))
    for component in BOTH:
        genuine = dict(layers(getattr(wanted, component)))
        for projection, layer in layers(getattr(again, component)):
            assert_near(layer.weight.detach(), genuine[projection].weight.detach(), 1e-6)
    assert_near(picture(again), picture(wanted))
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    assert set(safetensors.torch.load_file(file)) == set(base.unet.state_dict())
