"""LoCA methods of a pipeline: tensors that are trained whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import (
    StableDiffusionPipeline,
)

from loca_vision import LoCAConfig, inject
from support.loader import CONV_IN, UNET
from support.pipelines import instruct_pix2pix, picture, quiet, stable_diffusion
from support.reference_weights import (
    adapter,
    assert_near,
    assert_same,
    expected,
    facts,
)


@pytest.mark.parametrize("make", [stable_diffusion, instruct_pix2pix])
def test_a_conv_in_trained_whole_comes_and_goes(make: Callable[[], Any], tmp_path: Path) -> None:
    pipe = make()
    before = facts(pipe)
    made = adapter(make(), UNET, whole=CONV_IN)
    plain = adapter(make(), UNET, seed=2)
    pipe.load_loca_weights(made.state(), "whole")
    assert_near(picture(pipe), expected((made, 1.0), make=make))
    assert torch.equal(pipe.unet.conv_in.weight, made.whole["unet.conv_in.weight"])
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path))
    assert torch.equal(tensors["full.unet.conv_in.weight"], made.whole["unet.conv_in.weight"])
    pipe.disable_loca()
    assert torch.equal(picture(pipe), before["picture"])
    pipe.enable_loca()
    assert torch.equal(pipe.unet.conv_in.bias, made.whole["unet.conv_in.bias"])
    pipe.set_loca_adapters([])
    assert torch.equal(picture(pipe), before["picture"])
    pipe.load_loca_weights(plain.state(), "plain")
    assert_near(picture(pipe), expected((plain, 1.0), make=make))
    pipe.set_loca_adapters(["whole", "plain"], [0.5, 1.0])
    assert_near(picture(pipe), expected((made, 0.5), (plain, 1.0), make=make))
    again = pipe.save_loca_weights(tmp_path / "again", "whole")
    assert torch.equal(safetensors.torch.load_file(again)["full.unet.conv_in.weight"], made.whole["unet.conv_in.weight"])
    pipe.unload_loca_weights()
    assert_same(pipe, before)


def test_a_conv_in_trained_here_is_saved_under_its_name(pipe: Any, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    inject(pipe.unet, LoCAConfig(n_components=5), "mine")
    pipe.unet.conv_in.requires_grad_(True)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)
    shown = picture(pipe)
    file = pipe.save_loca_weights(tmp_path)
    tensors = safetensors.torch.load_file(file)
    assert {key for key in tensors if key.startswith("full.")} == {"full.unet.conv_in.weight", "full.unet.conv_in.bias"}
    other = stable_diffusion()
    base = facts(other)
    other.load_loca_weights(file)
    assert torch.equal(picture(other), shown)
    other.unload_loca_weights()
    assert_same(other, base)
    found = other.unet.state_dict()
    assert all(torch.equal(found[key], value) for key, value in before.items())


@pytest.mark.parametrize("fused", [False, True], ids=["beside the weights", "fused"])
def test_a_saved_pipeline_has_the_conv_in_that_goes_with_its_weights(fused: bool, pipe: Any, tmp_path: Path) -> None:
    base = picture(pipe)
    made = adapter(stable_diffusion(), UNET, whole=CONV_IN)
    pipe.load_loca_weights(made.state())
    pipe.fuse_loca() if fused else None
    pipe.save_pretrained(tmp_path)
    again = quiet(StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None))
    assert_near(picture(again), expected((made, 1.0)) if fused else base, 1e-5 if fused else 1e-12)
    assert_near(picture(pipe), expected((made, 1.0)))


def test_the_last_adapter_named_supplies_whole_tensors(pipe: Any) -> None:
    one = adapter(stable_diffusion(), UNET, seed=1, whole=CONV_IN)
    other = adapter(stable_diffusion(), UNET, seed=2, whole=CONV_IN)
    pipe.load_loca_weights(one.state(), "one")
    pipe.load_loca_weights(other.state(), "other")
    for names, terms in (
        (["one", "other"], ((one, 1.0), (other, 1.0))),
        (["other", "one"], ((other, 1.0), (one, 1.0))),
        (["one"], ((one, 1.0),)),
    ):
        pipe.set_loca_adapters(names)
        assert_near(picture(pipe), expected(*terms))
