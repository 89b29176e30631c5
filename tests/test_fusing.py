"""Adapters written into the weights of a pipeline and taken out again bit for bit; others swapped into their places."""

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
from oracle import (
    FILE_NAME,
    Made,
    adapter,
    assert_far,
    assert_near,
    assert_same,
    expected,
    facts,
    layers,
    listed,
    merged,
    models,
)
from peft import LoraConfig
from tiny import instruct_pix2pix, picture, quiet, stable_diffusion, stable_diffusion_xl
from torch import Tensor, nn

from loca_vision import LoCAConfig, adapters, inject, remove, save_adapter, set_adapters
from loca_vision.methods.update import Update
from loca_vision.pipeline import fuse as fusing
from loca_vision.pipeline import load as loading
from loca_vision.pipeline import loader

BOTH = {"unet": ("q", "v"), "text_encoder": ("q", "out")}
UNET = {"unet": ("q", "v")}
TEXT = {"text_encoder": ("q", "v")}
CONV_IN = ["unet.conv_in.weight", "unet.conv_in.bias"]
PRECISIONS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module")
def base() -> Tensor:
    return picture(stable_diffusion())


@pytest.fixture(scope="module")
def a() -> Made:
    return adapter(stable_diffusion(), BOTH, seed=1)


@pytest.fixture(scope="module")
def b() -> Made:
    return adapter(stable_diffusion(), {"unet": ("v", "out"), "text_encoder": ("k",)}, seed=2, scale=0.7, n=20)


@pytest.fixture
def pipe(a: Made) -> Any:
    """With the adapter `a`."""
    pipe = stable_diffusion()
    pipe.load_loca_weights(a.state(), "a")
    return pipe


@pytest.fixture
def two(pipe: Any, b: Made) -> Any:
    """With the adapters `a` at 0.5 and `b` at 0.25."""
    pipe.load_loca_weights(b.state(), "b")
    pipe.set_loca_adapters(["a", "b"], [0.5, 0.25])
    return pipe


def weights_of(pipe: Any) -> dict[str, Tensor]:
    return {f"{c}.{key}": value.clone() for c, model in models(pipe).items() for key, value in model.state_dict().items()}


def assert_equal(pipe: Any, weights: dict[str, Tensor]) -> None:
    after = weights_of(pipe)
    assert list(after) == list(weights)
    for key, value in weights.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value), key


# Into the weights and out again


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
    with pytest.raises(ValueError, match=r"scale=.*: a weight is a finite number"):
        pipe.fuse_loca(scale=scale)
    assert_same(pipe, before)


def test_one_of_two_is_fused_and_the_other_acts_beside(two: Any, a: Made, b: Made) -> None:
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
    with pytest.raises(ValueError, match="there is no active adapter to fuse; call set_loca_adapters first"):
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
        ("unet", r"components='unet': a list of names is wanted"),
        ([], r"components=\[\]: a list of names is wanted"),
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


def test_an_adapter_that_comes_later_acts_beside_a_fused_one(pipe: Any, a: Made, b: Made) -> None:
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


# What cannot be written


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


class Failing:
    """A function that fails at its call of that number."""

    def __init__(self, function: Callable[..., Any], at: int) -> None:
        self.function, self.left = function, at

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("no memory left")
        return self.function(*args, **named)


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
        patch.setattr(loader, "fuse", Failing(fusing.fuse, at))
        with pytest.raises(RuntimeError, match="no memory left"):
            two.fuse_loca(adapter_names=["a"])
    assert_same(two, before)


# The functions for one model, while something is fused


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


# Query, key and value in one layer


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


# Another hand in the same weights


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


# Swapping


def with_room(room: int, made: Made, name: str = "a") -> Any:
    pipe = stable_diffusion()
    pipe.enable_loca_hotswap(room)
    pipe.load_loca_weights(made.state(), name)
    return pipe


def learned(pipe: Any) -> dict[str, int]:
    """The tensors of all spectra, by name."""
    return {
        key: id(value)
        for c, model in models(pipe).items()
        for key, value in ((f"{c}.{key}", p) for key, p in model.named_parameters())
        if key.endswith(("coefficients", "locations"))
    }


def test_another_adapter_takes_the_place(pipe: Any, a: Made) -> None:
    objects, classes = learned(pipe), facts(pipe)["classes"]
    for seed, scale in ((3, 2.0), (4, -0.5), (5, 7.0)):
        other = adapter(stable_diffusion(), BOTH, seed=seed, scale=scale, size=1 / abs(scale))
        before = picture(pipe)
        pipe.load_loca_weights(other.state(), "a", hotswap=True)
        assert learned(pipe) == objects and facts(pipe)["classes"] == classes
        assert pipe.get_loca_adapters() == listed(BOTH, "a") and pipe.get_active_loca_adapters() == ["a"]
        assert_far(picture(pipe), before)
        assert_near(picture(pipe), expected((other, 1.0)))
    pipe.load_loca_weights(a.state(), hotswap=True)
    assert_near(picture(pipe), expected((a, 1.0)))


def test_it_acts_as_strongly_as_the_one_before(two: Any, a: Made, b: Made) -> None:
    other = adapter(stable_diffusion(), BOTH, seed=3)
    two.load_loca_weights(other.state(), "a", hotswap=True)
    assert_near(picture(two), expected((other, 0.5), (b, 0.25)))
    two.set_loca_adapters("b")
    two.load_loca_weights(a.state(), "a", hotswap=True)
    assert two.get_active_loca_adapters() == ["b"]
    assert_near(picture(two), expected((b, 1.0)))
    two.set_loca_adapters("a", {"unet": {"down": 0.5}})
    two.load_loca_weights(other.state(), "a", hotswap=True)
    assert_near(picture(two), expected((other, lambda name: 0.5 if name.startswith("unet.down_blocks.") else 1.0)))
    two.disable_loca()
    two.load_loca_weights(a.state(), "a", hotswap=True)
    assert torch.equal(picture(two), picture(stable_diffusion()))


@pytest.mark.parametrize("count", [1, 5, 12])
def test_fewer_components_fit_without_room_made(count: int, pipe: Any) -> None:
    other = adapter(stable_diffusion(), BOTH, seed=3, n=count, size=3.0)
    pipe.load_loca_weights(other.state(), "a", hotswap=True)
    assert_near(picture(pipe), expected((other, 1.0)))


def test_more_components_need_room(pipe: Any) -> None:
    before = facts(pipe)
    for made in (
        adapter(stable_diffusion(), BOTH, n=13),
        adapter(stable_diffusion(), BOTH, n=lambda name: 13 if name == "text_encoder.encoder.layers.1.self_attn.out" else 12),
    ):
        words = (
            r"\.\w+ has 13 components and the adapter that it should replace has room for 12; "
            "call enable_loca_hotswap before the first"
        )
        with pytest.raises(ValueError, match=words):
            pipe.load_loca_weights(made.state(), "a", hotswap=True)
        assert_same(pipe, before)


def test_with_room_any_count_up_to_it_fits(a: Made) -> None:
    pipe = with_room(40, a)
    assert_near(picture(pipe), expected((a, 1.0)))
    for count in (40, 1, 23):
        other = adapter(stable_diffusion(), BOTH, seed=count, n=count, size=0.5)
        pipe.load_loca_weights(other.state(), "a", hotswap=True)
        assert_near(picture(pipe), expected((other, 1.0)))
    before = facts(pipe)
    with pytest.raises(ValueError, match="has 41 components and the adapter that it should replace has room for 40"):
        pipe.load_loca_weights(adapter(stable_diffusion(), BOTH, n=41).state(), "a", hotswap=True)
    with pytest.raises(ValueError, match="has 41 components: there is room for 40"):
        pipe.load_loca_weights(adapter(stable_diffusion(), BOTH, n=41).state(), "b")
    assert_same(pipe, before)


def test_room_changes_neither_file_nor_base(a: Made, tmp_path: Path) -> None:
    pipe = stable_diffusion()
    before = facts(pipe)
    pipe.enable_loca_hotswap(99)
    pipe.load_loca_weights(a.state(), "a")
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path))
    assert set(tensors) == set(a.tensors)
    assert all(torch.equal(tensors[key], value) for key, value in a.tensors.items())
    pipe.fuse_loca()
    assert_near(picture(pipe), expected((a, 1.0)))
    pipe.unload_loca_weights()
    assert_same(pipe, before)


@pytest.mark.parametrize("room", [0, -1, True, 1.5, "5", None])
def test_room_is_a_whole_number(room: Any, a: Made) -> None:
    pipe = stable_diffusion()
    with pytest.raises(ValueError, match=r"max_components=.*: it is a whole number from 1 up"):
        pipe.enable_loca_hotswap(room)
    pipe.load_loca_weights(a.state())


def test_room_is_made_before_the_first(pipe: Any) -> None:
    before = facts(pipe)
    with pytest.raises(ValueError, match="call enable_loca_hotswap before the first"):
        pipe.enable_loca_hotswap(30)
    with pytest.raises(ValueError, match="has room for 12"):
        pipe.load_loca_weights(adapter(stable_diffusion(), BOTH, n=20).state(), "a", hotswap=True)
    assert_same(pipe, before)


@pytest.mark.parametrize("name", ["c", None, "", 7])
def test_the_name_to_replace_must_be_one_there(name: Any, two: Any, a: Made) -> None:
    before = facts(two)
    with pytest.raises(ValueError, match=r"adapter_name=.*: hotswap replaces a loaded adapter; there is a, b"):
        two.load_loca_weights(a.state(), name, hotswap=True)
    assert_same(two, before)
    empty = stable_diffusion()
    with pytest.raises(ValueError, match="hotswap replaces a loaded adapter; there is none"):
        empty.load_loca_weights(a.state(), name, hotswap=True)


def test_another_component_is_refused(a: Made) -> None:
    pipe = stable_diffusion()
    pipe.load_loca_weights(adapter(stable_diffusion(), UNET, seed=3).state(), "a")
    before = facts(pipe)
    for made in (a, adapter(stable_diffusion(), TEXT)):
        with pytest.raises(ValueError, match="no adapter"):
            pipe.load_loca_weights(made.state(), "a", hotswap=True)
        assert_same(pipe, before)
    inject(pipe.text_encoder, LoCAConfig(n_components=12), "b")
    before = facts(pipe)
    with pytest.raises(ValueError, match="no adapter 'a'"):
        pipe.load_loca_weights(a.state(), "a", hotswap=True)
    assert_same(pipe, before)


def test_another_projection_is_refused(pipe: Any, b: Made) -> None:
    before = facts(pipe)
    for parts in ({"unet": ("q", "k", "v")}, {"unet": ("q", "v"), "text_encoder": ("q", "v")}, {"unet": ("out",)}):
        words = r"\.(k|v|out) is not among the projections of adapter 'a'"
        with pytest.raises(ValueError, match=words):
            pipe.load_loca_weights(adapter(stable_diffusion(), parts, n=3).state(), "a", hotswap=True)
        assert_same(pipe, before)


def test_a_hostile_file_is_not_swapped_in(pipe: Any, a: Made, tmp_path: Path) -> None:
    before = facts(pipe)
    key = next(key for key in a.tensors if key.startswith("text_encoder.") and key.endswith("coefficients"))
    for made in (a.with_tensors(**{key: a.tensors[key] * math.nan}), a.with_tensors(**{key: None}), a.but(format_version=2)):
        with pytest.raises(ValueError, match=FILE_NAME):
            pipe.load_loca_weights(made.write(tmp_path), "a", hotswap=True)
        assert_same(pipe, before)


def test_a_swap_that_fails_half_way_changes_nothing(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = facts(pipe)
    other = adapter(stable_diffusion(), BOTH, seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "swap", Failing(loading.swap, 2))
        with pytest.raises(RuntimeError, match="no memory left"):
            pipe.load_loca_weights(other.state(), "a", hotswap=True)
    assert_same(pipe, before)


def test_what_is_fused_is_not_swapped(pipe: Any, a: Made) -> None:
    pipe.fuse_loca()
    before = facts(pipe)
    with pytest.raises(ValueError, match="adapter 'a' is fused into the weights"):
        pipe.load_loca_weights(a.state(), "a", hotswap=True)
    assert_same(pipe, before)


NARROW: list[dict[str, Any]] = [
    UNET,
    {"unet": ("q",)},
    {"unet": ("v",), "text_encoder": ("out",)},
    {"text_encoder": ("q",)},
]


@pytest.mark.parametrize("parts", NARROW, ids=str)
def test_projections_and_components_that_are_left_rest(
    parts: dict[str, Any], pipe: Any, a: Made, base: Tensor, tmp_path: Path
) -> None:
    narrow = adapter(stable_diffusion(), parts, seed=3, n=7, scale=0.5, size=4.0)
    pipe.load_loca_weights(narrow.state(), "a", hotswap=True)
    shown = picture(pipe)
    assert_far(shown, base)
    assert_near(shown, expected((narrow, 1.0)))
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path))
    assert set(tensors) == set(narrow.tensors)
    assert all(torch.equal(tensors[key], value) for key, value in narrow.tensors.items())
    other = stable_diffusion()
    other.load_loca_weights(tmp_path)
    assert_near(picture(other), shown, 1e-6)
    pipe.load_loca_weights(a.state(), "a", hotswap=True)
    assert_near(picture(pipe), expected((a, 1.0)))
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path))
    assert all(torch.equal(tensors[key], value) for key, value in a.tensors.items())


def test_whole_tensors_are_swapped_too(a: Made) -> None:
    pipe = stable_diffusion()
    before = facts(pipe)
    pipe.load_loca_weights(a.state(), "a")
    whole = [adapter(stable_diffusion(), BOTH, seed=seed, whole=CONV_IN) for seed in (3, 4)]
    for made in (*whole, a, whole[0]):
        pipe.load_loca_weights(made.state(), "a", hotswap=True)
        assert_near(picture(pipe), expected((made, 1.0)))
        wanted = made.whole.get("unet.conv_in.weight", before["tensors"]["unet.conv_in.weight"])
        assert torch.equal(pipe.unet.conv_in.weight, wanted)
        pipe.disable_loca()
        assert torch.equal(picture(pipe), before["picture"])
        pipe.enable_loca()
        assert torch.equal(pipe.unet.conv_in.weight, wanted)
    pipe.unload_loca_weights()
    assert_same(pipe, before)


def test_whole_tensors_of_one_that_rests_wait(two: Any, b: Made) -> None:
    two.set_loca_adapters("b")
    made = adapter(stable_diffusion(), BOTH, seed=3, whole=CONV_IN)
    two.load_loca_weights(made.state(), "a", hotswap=True)
    assert_near(picture(two), expected((b, 1.0)))
    two.set_loca_adapters("a")
    assert_near(picture(two), expected((made, 1.0)))


def test_swapping_with_less_memory(a: Made) -> None:
    pipe = stable_diffusion()
    pipe.enable_loca_low_memory()
    pipe.enable_loca_hotswap(30)
    pipe.load_loca_weights(a.state(), "a")
    other = adapter(stable_diffusion(), BOTH, seed=3, n=30, size=0.5)
    pipe.load_loca_weights(other.state(), "a", hotswap=True)
    assert_near(picture(pipe), expected((other, 1.0)))


def test_another_pipeline_of_the_components_can_swap(pipe: Any) -> None:
    other = adapter(stable_diffusion(), BOTH, seed=3)
    quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe)).load_loca_weights(other.state(), "a", hotswap=True)
    assert_near(picture(pipe), expected((other, 1.0)))


def test_nothing_is_compiled_anew(a: Made) -> None:
    pipe = with_room(30, a)
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager", fullgraph=True)
    assert_near(picture(pipe), expected((a, 1.0)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for count in (30, 3, 17):
            other = adapter(stable_diffusion(), BOTH, seed=count, n=count, scale=count / 10, size=0.5)
            pipe.load_loca_weights(other.state(), "a", hotswap=True)
            assert_near(picture(pipe), expected((other, 1.0)))
        pipe.set_loca_adapters("a", {"unet": {"down": 0.5}})
        assert_near(picture(pipe), expected((other, lambda name: 0.5 if name.startswith("unet.down_blocks.") else 1.0)))
        pipe.set_loca_adapters("a")
        pipe.load_loca_weights(adapter(stable_diffusion(), UNET, seed=5).state(), "a", hotswap=True)
        assert_near(picture(pipe), expected((adapter(stable_diffusion(), UNET, seed=5), 1.0)))
        pipe.disable_loca()
        assert_near(picture(pipe), picture(stable_diffusion()))
        pipe.enable_loca()
        pipe.load_loca_weights(a.state(), "a", hotswap=True)
        pipe.fuse_loca()
        assert_near(picture(pipe), expected((a, 1.0)))
        pipe.unfuse_loca()
        assert_near(picture(pipe), expected((a, 1.0)))


def test_an_injected_adapter_is_replaced(base: Tensor) -> None:
    pipe = stable_diffusion()
    inject(pipe.unet, LoCAConfig(n_components=12, targets=("q", "v")), "mine")
    other = adapter(stable_diffusion(), UNET, seed=3)
    pipe.load_loca_weights(other.state(), hotswap=True)
    assert pipe.get_loca_adapters() == {"unet": ["mine"]}
    assert_near(picture(pipe), expected((other, 1.0)))
    spectrum = next(iter(adapters(pipe.unet, "mine").values()))
    assert spectrum.count == 12
