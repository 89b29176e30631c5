"""A `conv_in` of eight channels in a file, and a UNet of four: it is widened as the file asks, and the old one comes back."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from conftest import randomise
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.hooks import apply_group_offloading
from oracle import Made, adapter, assert_near, assert_same, expected, facts
from torch import Tensor, nn

import loca_vision.diffusers  # noqa: F401
from loca_vision import LoCAConfig, inject, load_adapter, remove, save_adapter, set_adapters
from loca_vision.model.conv_in import widen_conv_in
from loca_vision.model.state import record_of
from loca_vision.pipeline import load as loading

UNET = {"unet": ("q", "v")}
CONV_IN = ("unet.conv_in.weight", "unet.conv_in.bias")
CPU = torch.device("cpu")


def pipeline() -> Any:
    """A Stable Diffusion in the pipeline of InstructPix2Pix, whose UNet takes four channels."""
    parts = {name: part for name, part in tiny.stable_diffusion().components.items() if name != "image_encoder"}
    return tiny.quiet(StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False))


def widened() -> Any:
    """The same after `widen_conv_in`, by hand."""
    pipe = pipeline()
    widen_conv_in(pipe.unet)
    return pipe


def as_base(pipe: Any) -> Any:
    """The same models in the pipeline of the base, of which a picture can be had while the UNet takes four channels."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    return tiny.quiet(StableDiffusionPipeline(**parts, requires_safety_checker=False))


def everything(pipe: Any) -> dict[str, Any]:
    return facts(as_base(pipe)) | {"config": dict(pipe.unet.config), "channels": pipe.unet.conv_in.in_channels}


def assert_as_before(pipe: Any, before: dict[str, Any]) -> None:
    """The very same parameters, bit for bit, with the same settings and hooks."""
    assert dict(pipe.unet.config) == before["config"] and pipe.unet.conv_in.in_channels == before["channels"]
    assert_same(as_base(pipe), {fact: value for fact, value in before.items() if fact not in ("config", "channels")})


def is_wide(pipe: Any, channels: int = 8) -> bool:
    unet = pipe.unet
    return {unet.conv_in.in_channels, unet.config.in_channels, unet.conv_in.weight.shape[1]} == {channels}


@pytest.fixture(scope="module")
def wide() -> Made:
    return adapter(widened(), UNET, seed=1, whole=CONV_IN)


@pytest.fixture(scope="module")
def other() -> Made:
    return adapter(widened(), UNET, seed=2, whole=CONV_IN)


@pytest.fixture(scope="module")
def plain() -> Made:
    """Made for four channels, with nothing trained whole."""
    return adapter(pipeline(), UNET, seed=3)


@pytest.fixture(scope="module")
def narrow() -> Made:
    """Made for four channels, with a `conv_in` of its own."""
    return adapter(pipeline(), UNET, seed=4, whole=CONV_IN)


@pytest.fixture(scope="module")
def base() -> Tensor:
    """What the base shows once it takes eight channels."""
    return tiny.picture(widened())


@pytest.fixture(scope="module")
def wanted(wide: Made) -> Tensor:
    """What the adapter shows on a UNet that was widened by hand."""
    pipe = widened()
    pipe.load_loca_weights(wide.state())
    return tiny.picture(pipe)


def trained(pipe: Any) -> Any:
    """As training from a plain base leaves it."""
    widen_conv_in(pipe.unet)
    inject(pipe.unet, LoCAConfig(n_components=8, targets=("q", "v")))
    randomise(pipe.unet)
    pipe.unet.conv_in.requires_grad_(True)
    optimiser = torch.optim.AdamW([p for p in pipe.unet.parameters() if p.requires_grad], lr=1e-2)
    pipe.unet(**tiny.inputs_of(pipe.unet)).sample.square().mean().backward()
    optimiser.step()
    return pipe


# Coming and going


def test_the_loaded_unet_is_the_one_that_was_trained(tmp_path: Path) -> None:
    model = trained(pipeline())
    output, shown = tiny.output_of(model.unet), tiny.picture(model)
    file, pipe = model.save_loca_weights(tmp_path), pipeline()
    before = everything(pipe)
    pipe.load_loca_weights(file)
    assert is_wide(pipe)
    assert torch.equal(tiny.output_of(pipe.unet), output) and torch.equal(tiny.picture(pipe), shown)
    pipe.unload_loca_weights()
    assert_as_before(pipe, before)


def test_a_file_of_the_unet_alone_goes_into_a_unet_and_into_a_pipeline(tmp_path: Path) -> None:
    model = trained(pipeline()).unet
    model.conv_in.weight.data[:, 4:] += 1
    output, file = tiny.output_of(model), save_adapter(model, tmp_path)
    unet = tiny.unet()
    kept = {key: (p, p.detach().clone(), p.requires_grad) for key, p in unet.named_parameters()}
    settings = dict(unet.config)
    load_adapter(unet, tmp_path)
    assert unet.conv_in.weight.requires_grad and torch.equal(tiny.output_of(unet), output)
    again = save_adapter(unet, tmp_path / "again")
    assert again.read_bytes() == file.read_bytes()
    remove(unet)
    assert dict(unet.config) == settings and list(kept) == [key for key, _ in unet.named_parameters()]
    for key, p in unet.named_parameters():
        assert p is kept[key][0] and torch.equal(p, kept[key][1]) and p.requires_grad == kept[key][2]
    pipe = pipeline()
    pipe.load_loca_weights(file)
    assert torch.equal(tiny.output_of(pipe.unet), output)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_is_trainable_stays_so(frozen: bool, wide: Made) -> None:
    pipe = pipeline()
    pipe.unet.requires_grad_(not frozen)
    before = everything(pipe)
    pipe.load_loca_weights(wide.state(), "a")
    assert pipe.unet.conv_in.weight.requires_grad is not frozen
    pipe.delete_loca_adapters("a")
    assert_as_before(pipe, before)


def test_more_channels_still() -> None:
    """Nine, as for inpainting; what the rule is for does not matter."""
    model = tiny.unet()
    widen_conv_in(model, 9)
    inject(model, LoCAConfig(n_components=4))
    model.conv_in.requires_grad_(True)
    torch.nn.init.normal_(model.conv_in.weight)
    state = {f"full.unet.conv_in.{key}": value for key, value in model.conv_in.state_dict().items()}
    made = adapter(pipeline(), UNET)
    made = Made(made.tensors | state, made.about | {"whole": list(CONV_IN)})
    pipe = pipeline()
    pipe.load_loca_weights(made.state())
    assert is_wide(pipe, 9) and torch.equal(pipe.unet.conv_in.weight, model.conv_in.weight)


def test_a_weight_without_a_bias_leaves_the_bias_of_the_base() -> None:
    made, pipe = adapter(widened(), UNET, whole=CONV_IN[:1]), pipeline()
    torch.nn.init.normal_(pipe.unet.conv_in.bias)
    before = everything(pipe)
    pipe.load_loca_weights(made.state())
    assert torch.equal(pipe.unet.conv_in.weight, made.whole[CONV_IN[0]])
    assert torch.equal(pipe.unet.conv_in.bias, before["tensors"]["unet.conv_in.bias"])
    pipe.unload_loca_weights()
    assert_as_before(pipe, before)


@pytest.mark.parametrize("merge", [lambda p: remove(p.unet, merge=True), lambda p: remove(p.unet, "a", merge=True)])
def test_merged_it_stays(merge: Callable[[Any], None], wide: Made) -> None:
    pipe = pipeline()
    pipe.load_loca_weights(wide.state(), "a")
    merge(pipe)
    assert pipe.get_loca_adapters() == {} and is_wide(pipe)
    assert torch.equal(pipe.unet.conv_in.weight, wide.whole[CONV_IN[0]])
    assert_near(tiny.picture(pipe), expected((wide, 1.0), make=widened))


def test_merged_while_another_stays(wide: Made, plain: Made) -> None:
    pipe = pipeline()
    pipe.load_loca_weights(plain.state(), "b")
    pipe.load_loca_weights(wide.state(), "a")
    pipe.set_loca_adapters(["a", "b"])
    remove(pipe.unet, "a", merge=True)
    pipe.unload_loca_weights()
    assert is_wide(pipe) and torch.equal(pipe.unet.conv_in.weight, wide.whole[CONV_IN[0]])
    assert_near(tiny.picture(pipe), expected((wide, 1.0), make=widened))


def test_merging_one_that_has_none_brings_the_old_layer_back(wide: Made, plain: Made) -> None:
    pipe = pipeline()
    old = pipe.unet.conv_in.weight
    pipe.load_loca_weights(wide.state(), "a")
    pipe.load_loca_weights(plain.state(), "b")
    remove(pipe.unet, merge=True)
    assert is_wide(pipe, 4) and pipe.unet.conv_in.weight is old
    assert_near(tiny.picture(as_base(pipe)), expected((plain, 1.0)))


# Not acting, and beside another


@pytest.mark.parametrize("off", [lambda pipe: pipe.disable_loca(), lambda pipe: pipe.set_loca_adapters([])])
def test_without_it_the_base_takes_eight_channels_and_sees_four(off: Callable[[Any], None], wide: Made, base: Tensor) -> None:
    pipe = pipeline()
    pipe.load_loca_weights(wide.state(), "a")
    off(pipe)
    assert is_wide(pipe) and torch.equal(tiny.picture(pipe), base)
    given = tiny.inputs_of(pipe.unet)
    ignored = given["sample"].clone()
    ignored[:, 4:] = 1e3
    with torch.no_grad():
        assert torch.equal(pipe.unet(**given).sample, pipe.unet(**given | {"sample": ignored}).sample)
    pipe.set_loca_adapters("a")
    assert torch.equal(pipe.unet.conv_in.weight, wide.whole[CONV_IN[0]])


@pytest.mark.parametrize("order", ["wide first", "wide last"])
@pytest.mark.parametrize("leaving", ["ab", "ba"])
def test_beside_one_for_four_channels(order: str, leaving: str, wide: Made, plain: Made, base: Tensor) -> None:
    pipe = pipeline()
    before = everything(pipe)
    for name, made in (("a", wide), ("b", plain)) if order == "wide first" else (("b", plain), ("a", wide)):
        pipe.load_loca_weights(made.state(), name)
        assert_near(tiny.picture(as_base(pipe) if made is plain and order == "wide last" else pipe), shown_by(made, order))
    for names in (["a", "b"], ["b", "a"]):
        pipe.set_loca_adapters(names)
        assert_near(tiny.picture(pipe), expected((wide, 1.0), (plain, 1.0), make=widened))
    pipe.set_loca_adapters("b")
    assert is_wide(pipe) and not pipe.unet.conv_in.weight[:, 4:].any()
    assert_near(tiny.picture(pipe), expected((plain, 1.0), make=widened))
    pipe.set_loca_adapters(["a", "b"])
    pipe.delete_loca_adapters(leaving[0])
    assert is_wide(pipe, 4 if leaving[0] == "a" else 8)
    rest = tiny.picture(as_base(pipe) if leaving[0] == "a" else pipe)
    assert_near(rest, expected((plain, 1.0)) if leaving[0] == "a" else expected((wide, 1.0), make=widened))
    pipe.delete_loca_adapters(leaving[1])
    assert_as_before(pipe, before)


def shown_by(made: Made, order: str) -> Tensor:
    """What one of the two shows as it is loaded."""
    wide_by_then = order == "wide first" or bool(made.whole)
    return expected((made, 1.0), make=widened) if wide_by_then else expected((made, 1.0))


@pytest.mark.parametrize("leaving", ["ab", "ba"])
def test_two_that_have_one_each(leaving: str, wide: Made, other: Made) -> None:
    pipe, made = pipeline(), {"a": wide, "b": other}
    before = everything(pipe)
    for name in made:
        pipe.load_loca_weights(made[name].state(), name)
    for name in made:
        pipe.set_loca_adapters(name)
        assert torch.equal(pipe.unet.conv_in.weight, made[name].whole[CONV_IN[0]])
    pipe.set_loca_adapters(["a", "b"])
    assert_near(tiny.picture(pipe), expected((wide, 1.0), (other, 1.0), make=widened))
    pipe.delete_loca_adapters(leaving[0])
    assert is_wide(pipe)
    assert_near(tiny.picture(pipe), expected((made[leaving[1]], 1.0), make=widened))
    pipe.delete_loca_adapters(leaving[1])
    assert_as_before(pipe, before)


def test_one_with_four_channels_of_its_own_is_refused_in_either_order(wide: Made, narrow: Made) -> None:
    pipe = pipeline()
    pipe.load_loca_weights(narrow.state(), "n")
    shown = tiny.picture(as_base(pipe))
    with pytest.raises(ValueError, match="for 8 channels, and adapter 'n' has a conv_in of its own for 4: remove it first"):
        pipe.load_loca_weights(wide.state(), "a")
    assert pipe.get_loca_adapters() == {"unet": ["n"]} and torch.equal(tiny.picture(as_base(pipe)), shown)
    pipe.delete_loca_adapters("n")
    pipe.load_loca_weights(wide.state(), "a")
    shown = tiny.picture(pipe)
    with pytest.raises(ValueError, match=r"\(16, 4, 3, 3\) in the file and \(16, 8, 3, 3\) in the model"):
        pipe.load_loca_weights(narrow.state(), "n")
    assert pipe.get_loca_adapters() == {"unet": ["a"]} and torch.equal(tiny.picture(pipe), shown)


def test_after_one_with_four_channels_has_left(wide: Made, narrow: Made, plain: Made) -> None:
    """The record goes on, with what it knew of the narrow layer."""
    pipe = pipeline()
    before = everything(pipe)
    pipe.load_loca_weights(plain.state(), "b")
    pipe.load_loca_weights(narrow.state(), "n")
    pipe.delete_loca_adapters("n")
    pipe.load_loca_weights(wide.state(), "a")
    assert_near(tiny.picture(pipe), expected((wide, 1.0), make=widened))
    pipe.delete_loca_adapters("a")
    pipe.load_loca_weights(narrow.state(), "n")
    assert_near(tiny.picture(as_base(pipe)), expected((narrow, 1.0)))
    pipe.unload_loca_weights()
    assert_as_before(pipe, before)


def test_one_that_trains_a_conv_in_of_four_channels_keeps_it(wide: Made) -> None:
    pipe = pipeline()
    inject(pipe.unet, LoCAConfig(n_components=4), "mine")
    pipe.unet.conv_in.requires_grad_(True)
    with pytest.raises(ValueError, match="adapter 'mine' has a conv_in of its own for 4"):
        pipe.load_loca_weights(wide.state(), "a")
    pipe.unet.conv_in.requires_grad_(False)
    pipe.load_loca_weights(wide.state(), "a")
    assert is_wide(pipe) and not pipe.unet.conv_in.weight.requires_grad


def test_training_goes_on_from_a_loaded_file(tmp_path: Path) -> None:
    save_adapter(trained(pipeline()).unet, tmp_path)
    unet = tiny.unet()
    load_adapter(unet, tmp_path)
    unet.train()
    unet(**tiny.inputs_of(unet)).sample.square().mean().backward()
    assert unet.conv_in.weight.grad is not None and unet.conv_in.weight.grad[:, 4:].any()


def test_another_is_trained_on_top_of_it(wide: Made) -> None:
    """Which freezes the wide layer; the old one comes back as the model is by then, and as it was in the end."""
    pipe = pipeline()
    before = everything(pipe)
    pipe.load_loca_weights(wide.state(), "a")
    inject(pipe.unet, LoCAConfig(n_components=4), "mine")
    assert is_wide(pipe) and not pipe.unet.conv_in.weight.requires_grad
    pipe.delete_loca_adapters("a")
    assert is_wide(pipe, 4) and not pipe.unet.conv_in.weight.requires_grad
    pipe.unload_loca_weights()
    assert_as_before(pipe, before)


# Fusing, copies, files


def test_fused_it_stays_until_unfused(wide: Made, base: Tensor) -> None:
    pipe = pipeline()
    before = everything(pipe)
    pipe.load_loca_weights(wide.state(), "a")
    pipe.fuse_loca()
    assert_near(tiny.picture(pipe), expected((wide, 1.0), make=widened))
    with pytest.raises(ValueError, match="fused"):
        pipe.delete_loca_adapters("a")
    assert is_wide(pipe)
    pipe.unfuse_loca()
    pipe.disable_loca()
    assert torch.equal(tiny.picture(pipe), base)
    pipe.enable_loca()
    pipe.fuse_loca()
    pipe.unload_loca_weights()
    assert_as_before(pipe, before)


def test_into_a_model_with_another_fused(wide: Made, plain: Made) -> None:
    pipe = pipeline()
    before = everything(pipe)
    pipe.load_loca_weights(plain.state(), "b")
    pipe.fuse_loca()
    pipe.load_loca_weights(wide.state(), "a")
    assert_near(tiny.picture(pipe), expected((plain, 1.0), (wide, 1.0), make=widened))
    pipe.delete_loca_adapters("a")
    assert_near(tiny.picture(as_base(pipe)), expected((plain, 1.0)))
    pipe.unload_loca_weights()
    assert_as_before(pipe, before)


@pytest.mark.parametrize("acting", [True, False])
def test_a_saved_model_is_the_base(acting: bool, wide: Made, tmp_path: Path) -> None:
    pipe = pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    pipe.load_loca_weights(wide.state(), "a")
    pipe.set_loca_adapters(["a"] if acting else [])
    shown = tiny.picture(pipe)
    pipe.unet.save_pretrained(tmp_path)
    again = UNet2DConditionModel.from_pretrained(tmp_path)
    assert again.config.in_channels == 4 and again.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())
    assert is_wide(pipe) and torch.equal(tiny.picture(pipe), shown)


def test_a_model_saved_fused_is_wide(wide: Made, tmp_path: Path) -> None:
    pipe = pipeline()
    pipe.load_loca_weights(wide.state(), "a")
    pipe.fuse_loca()
    pipe.save_pretrained(tmp_path)
    again = tiny.quiet(StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path, safety_checker=None))
    assert is_wide(again) and torch.equal(again.unet.conv_in.weight, wide.whole[CONV_IN[0]])
    assert torch.equal(tiny.picture(again), tiny.picture(pipe))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_a_copy_has_an_old_layer_of_its_own(copied: Callable[[nn.Module], Any], wide: Made, wanted: Tensor) -> None:
    pipe = pipeline()
    old = pipe.unet.conv_in.weight
    pipe.load_loca_weights(wide.state(), "a")
    twin = copied(pipe.unet)
    assert torch.equal(tiny.output_of(twin), tiny.output_of(pipe.unet))
    remove(twin)
    assert twin.config.in_channels == 4 and twin.conv_in.weight is not old and torch.equal(twin.conv_in.weight, old)
    assert is_wide(pipe) and torch.equal(tiny.picture(pipe), wanted)
    pipe.unload_loca_weights()
    assert pipe.unet.conv_in.weight is old


# Swapping


def test_swapped_in_it_widens_and_swapped_out_the_old_layer_is_back(wide: Made, plain: Made, wanted: Tensor) -> None:
    pipe = pipeline()
    before = everything(pipe)
    pipe.load_loca_weights(plain.state(), "a")
    pipe.load_loca_weights(wide.state(), "a", hotswap=True)
    assert is_wide(pipe) and torch.equal(tiny.picture(pipe), wanted)
    pipe.load_loca_weights(plain.state(), "a", hotswap=True)
    assert is_wide(pipe, 4)
    assert_near(tiny.picture(as_base(pipe)), expected((plain, 1.0)))
    pipe.unload_loca_weights()
    assert_as_before(pipe, before)


def test_swapped_for_another_wide_one_the_parameter_stays(wide: Made, other: Made) -> None:
    """So that nothing is compiled anew."""
    pipe = pipeline()
    before = everything(pipe)
    pipe.load_loca_weights(wide.state(), "a")
    weight = pipe.unet.conv_in.weight
    pipe.load_loca_weights(other.state(), "a", hotswap=True)
    assert pipe.unet.conv_in.weight is weight and torch.equal(weight, other.whole[CONV_IN[0]])
    pipe.unload_loca_weights()
    assert_as_before(pipe, before)


def test_swapped_for_one_with_four_channels_of_its_own(wide: Made, narrow: Made, wanted: Tensor) -> None:
    pipe = pipeline()
    before = everything(pipe)
    pipe.load_loca_weights(narrow.state(), "a")
    pipe.load_loca_weights(wide.state(), "a", hotswap=True)
    assert torch.equal(tiny.picture(pipe), wanted)
    pipe.disable_loca()
    assert torch.equal(pipe.unet.conv_in.weight[:, :4], before["tensors"][CONV_IN[0]])
    pipe.enable_loca()
    with pytest.raises(ValueError, match=r"\(16, 4, 3, 3\) in the file"):
        pipe.load_loca_weights(narrow.state(), "a", hotswap=True)
    assert torch.equal(tiny.picture(pipe), wanted)
    pipe.unload_loca_weights()
    assert_as_before(pipe, before)


def test_swapped_while_another_has_four_channels_of_its_own(wide: Made, narrow: Made, plain: Made) -> None:
    pipe = pipeline()
    pipe.load_loca_weights(narrow.state(), "n")
    pipe.load_loca_weights(plain.state(), "a")
    with pytest.raises(ValueError, match="adapter 'n' has a conv_in of its own for 4"):
        pipe.load_loca_weights(wide.state(), "a", hotswap=True)
    assert is_wide(pipe, 4)


@pytest.mark.parametrize("hotswap", [False, True])
@pytest.mark.parametrize("present", ["plain", "narrow"])
def test_what_fails_after_all_leaves_the_old_layer(
    hotswap: bool, present: str, wide: Made, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: Made = request.getfixturevalue(present if hotswap else "plain")
    pipe = pipeline()
    pipe.load_loca_weights(there.state(), "a")
    before = everything(pipe)
    step = "swap" if hotswap else "activate"
    real, calls = getattr(loading, step), []

    def failing(*args: Any, **kwargs: Any) -> None:
        calls.append(is_wide(pipe))
        real(*args, **kwargs)
        if len(calls) == 1:
            assert is_wide(pipe)
            raise RuntimeError("no memory")

    monkeypatch.setattr(loading, step, failing)
    with pytest.raises(RuntimeError, match="no memory"):
        pipe.load_loca_weights(wide.state(), "a" if hotswap else "new", hotswap=hotswap)
    assert_as_before(pipe, before)


# Precisions, wrappers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype: torch.dtype, wide: Made) -> None:
    by_hand, unet = widened().unet.to(dtype), tiny.unet().to(dtype)
    pipe = pipeline()
    pipe.unet = unet
    kept = {key: (id(p), p.detach().clone()) for key, p in unet.named_parameters()}
    pipe.load_loca_weights(wide.state(), "a")
    load_into(by_hand, wide)
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tiny.inputs_of(unet).items()}
    assert unet.conv_in.weight.dtype == dtype
    with torch.no_grad():
        assert torch.equal(unet(**given).sample, by_hand(**given).sample)
    pipe.unload_loca_weights()
    assert all((id(p), p.dtype) == (kept[k][0], dtype) and torch.equal(p, kept[k][1]) for k, p in unet.named_parameters())


def load_into(unet: nn.Module, made: Made) -> None:
    pipe = pipeline()
    pipe.unet = unet
    pipe.load_loca_weights(made.state())


def test_the_old_layer_follows_the_model(wide: Made) -> None:
    pipe = pipeline()
    old = pipe.unet.conv_in.weight
    values = old.detach().clone()
    pipe.load_loca_weights(wide.state(), "a")
    pipe.unet.to(torch.bfloat16)
    pipe.unload_loca_weights()
    assert pipe.unet.conv_in.weight is old and torch.equal(old, values.bfloat16())
    assert {p.dtype for p in pipe.unet.parameters()} == {torch.bfloat16}


def test_in_inference_mode(wide: Made, wanted: Tensor) -> None:
    pipe = pipeline()
    before = everything(pipe)
    with torch.inference_mode():
        pipe.load_loca_weights(wide.state(), "a")
    assert not pipe.unet.conv_in.weight.is_inference() and torch.equal(tiny.picture(pipe), wanted)
    with torch.inference_mode():
        pipe.unload_loca_weights()
    assert_as_before(pipe, before)


OFFLOADS: dict[str, Callable[[nn.Module], Any]] = {
    "sequential": lambda unet: cpu_offload(unet, execution_device=CPU),
    "model": lambda unet: cpu_offload_with_hook(unet, execution_device=CPU),
    "leaves": lambda unet: apply_group_offloading(unet, onload_device=CPU, offload_type="leaf_level"),
    "blocks": lambda unet: apply_group_offloading(unet, onload_device=CPU, offload_type="block_level", num_blocks_per_group=1),
}


def loaded_and_offloaded(pipe: Any, kind: str, when: str, made: Made) -> Any:
    if when == "before":
        OFFLOADS[kind](pipe.unet)
    pipe.load_loca_weights(made.state(), "a")
    if when == "after":
        OFFLOADS[kind](pipe.unet)
    return pipe


@pytest.mark.parametrize("kind", OFFLOADS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded(kind: str, when: str, wide: Made, base: Tensor) -> None:
    wanted = tiny.picture(loaded_and_offloaded(widened(), kind, when, wide))
    pipe = pipeline()
    shown = tiny.picture(as_base(pipe))
    loaded_and_offloaded(pipe, kind, when, wide)
    assert is_wide(pipe) and torch.equal(tiny.picture(pipe), wanted)
    pipe.disable_loca()
    assert torch.equal(tiny.picture(pipe), base)
    pipe.enable_loca()
    assert torch.equal(tiny.picture(pipe), wanted)
    pipe.unload_loca_weights()
    assert is_wide(pipe, 4) and torch.equal(tiny.picture(as_base(pipe)), shown)
    if kind == "sequential":
        remove_hook_from_module(pipe.unet, recurse=True)
        assert torch.equal(pipe.unet.conv_in.weight, tiny.unet().conv_in.weight)


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}])
def test_offloaded_to_a_disk_it_is_refused(kind: dict[str, Any], wide: Made, tmp_path: Path) -> None:
    """There, what the parameter holds is nothing, and a new one would never be looked at."""
    pipe = pipeline()
    before = tiny.picture(as_base(pipe))
    apply_group_offloading(pipe.unet, onload_device=CPU, offload_to_disk_path=str(tmp_path), **kind)
    with pytest.raises(ValueError, match="conv_in is offloaded to a disk or by a stream: load it first"):
        pipe.load_loca_weights(wide.state(), "a")
    assert is_wide(pipe, 4) and torch.equal(tiny.picture(as_base(pipe)), before)


def test_compiled(wide: Made, wanted: Tensor) -> None:
    pipe = pipeline()
    narrow = tiny.picture(as_base(pipe))
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    given = tiny.inputs_of(pipe.unet._orig_mod)
    with torch.no_grad():
        pipe.unet(**given)
    pipe.load_loca_weights(wide.state(), "a")
    assert is_wide(pipe)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(tiny.picture(pipe), wanted)
    with torch.no_grad():
        found = pipe.unet(**tiny.inputs_of(pipe.unet._orig_mod)).sample
    by_hand = widened()
    by_hand.load_loca_weights(wide.state())
    assert_near(found, tiny.output_of(by_hand.unet))
    pipe.unload_loca_weights()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(tiny.picture(as_base(pipe)), narrow)
    with torch.no_grad():
        assert_near(pipe.unet(**given).sample, tiny.output_of(tiny.unet()))


def test_a_layer_that_somebody_puts_there_since_is_left_alone(wide: Made) -> None:
    pipe = pipeline()
    pipe.load_loca_weights(wide.state(), "a")
    theirs = pipe.unet.conv_in = nn.Conv2d(5, 16, 3, padding=1)
    pipe.unload_loca_weights()
    assert pipe.unet.conv_in is theirs and theirs.weight.shape == (16, 5, 3, 3) and record_of(pipe.unet) is None


# What is refused


def conv_in(weight: Tensor | None = None, bias: Tensor | None = None) -> Callable[[Made], Made]:
    """Another `conv_in` in the file."""
    given = {f"full.{key}": value for key, value in zip(CONV_IN, (weight, bias), strict=True) if value is not None}
    return lambda made: Made(made.tensors | given, made.about)


def in_another_place(name: str, value: Tensor) -> Callable[[Made], Made]:
    return lambda made: Made(made.tensors | {f"full.unet.{name}": value}, made.about | {"whole": [*CONV_IN, f"unet.{name}"]})


HOSTILE: dict[str, tuple[Callable[[Made], Made], str]] = {
    "no channels": (conv_in(torch.ones(16, 0, 3, 3)), r"\(16, 0, 3, 3\) in the file and \(16, 4, 3, 3\) in the model"),
    "fewer channels": (conv_in(torch.ones(16, 3, 3, 3)), r"\(16, 3, 3, 3\) in the file"),
    "channels without end": (conv_in(torch.ones(16, 257, 3, 3)), "for 257 channels: conv_in is widened from 4 to 256 at most"),
    "another kernel": (conv_in(torch.ones(16, 8, 1, 1)), r"\(16, 8, 1, 1\) in the file"),
    "a lying kernel": (conv_in(torch.ones(16, 8, 3, 1)), r"\(16, 8, 3, 1\) in the file"),
    "other output channels": (conv_in(torch.ones(32, 8, 3, 3)), r"\(32, 8, 3, 3\) in the file"),
    "a matrix": (conv_in(torch.ones(16, 72)), r"\(16, 72\) in the file"),
    "a number": (conv_in(torch.ones(())), r"\(\) in the file"),
    "whole numbers": (conv_in(torch.ones(16, 8, 3, 3, dtype=torch.int32)), "dtype I32"),
    "NaN": (conv_in(torch.full((16, 8, 3, 3), math.nan)), "holds NaN"),
    "infinity in a new channel": (
        conv_in(torch.ones(16, 8, 3, 3).index_fill(1, torch.tensor([7]), math.inf)),
        "holds NaN or infinity",
    ),
    "too large": (conv_in(torch.full((16, 8, 3, 3), 1e300, dtype=torch.float64)), "overflows torch.float32"),
    "a longer bias": (conv_in(bias=torch.ones(32)), r"conv_in.bias is \(32,\) in the file"),
    "a bias that is missing": (lambda m: m.with_tensors(**{f"full.{CONV_IN[1]}": None}), "conv_in.bias is missing"),
    "a wider conv_out": (in_another_place("conv_out.weight", torch.ones(4, 32, 3, 3)), r"conv_out.weight is \(4, 32, 3, 3\)"),
    "a wider convolution inside": (
        in_another_place("down_blocks.0.resnets.0.conv1.weight", torch.ones(16, 32, 3, 3)),
        r"conv1.weight is \(16, 32, 3, 3\)",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("hotswap", [False, True])
def test_a_hostile_file_is_refused_and_nothing_is_touched(case: str, hotswap: bool, wide: Made, plain: Made) -> None:
    change, sentence = HOSTILE[case]
    pipe = pipeline()
    if hotswap:
        pipe.load_loca_weights(plain.state(), "a")
    before = everything(pipe)
    with pytest.raises(ValueError, match=sentence):
        pipe.load_loca_weights(change(wide).state(), "a", hotswap=hotswap)
    assert_as_before(pipe, before)


def test_a_conv_in_that_is_no_plain_convolution_is_not_widened(wide: Made) -> None:
    pipe = pipeline()
    pipe.unet.conv_in = nn.Sequential(pipe.unet.conv_in)
    with pytest.raises(ValueError, match=r"no parameter conv_in\.weight"):
        pipe.load_loca_weights(wide.state())
    grouped = pipeline()
    grouped.unet.conv_in = nn.Conv2d(8, 16, 3, padding=1, groups=2)
    with pytest.raises(ValueError, match=r"\(16, 8, 3, 3\) in the file and \(16, 4, 3, 3\) in the model"):
        grouped.load_loca_weights(wide.state())


def test_a_unet_that_takes_more_than_the_file_is_left(wide: Made) -> None:
    pipe = pipeline()
    widen_conv_in(pipe.unet, 9)
    with pytest.raises(ValueError, match=r"\(16, 8, 3, 3\) in the file and \(16, 9, 3, 3\) in the model"):
        pipe.load_loca_weights(wide.state())


def test_a_model_that_is_no_unet_of_diffusers_is_not_widened(tmp_path: Path) -> None:
    class Small(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv_in = nn.Conv2d(channels, 16, 3)
            self.inner = tiny.unet()

    model = Small(8)
    inject(model, LoCAConfig(n_components=4))
    model.conv_in.requires_grad_(True)
    save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match=r"\(16, 8, 3, 3\) in the file and \(16, 4, 3, 3\) in the model"):
        load_adapter(Small(4), tmp_path)


def test_the_functions_of_a_model_by_itself(tmp_path: Path, wide: Made) -> None:
    """`set_adapters` on a UNet, as the methods on a pipeline."""
    pipe = pipeline()
    pipe.load_loca_weights(wide.state(), "a")
    set_adapters(pipe.unet, [])
    assert is_wide(pipe) and not pipe.unet.conv_in.weight[:, 4:].any()
    set_adapters(pipe.unet, "a", weights=0.0)
    assert torch.equal(pipe.unet.conv_in.weight, wide.whole[CONV_IN[0]])
