"""An eight-channel conv_in in a four-channel UNet: fusing and copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from torch import Tensor, nn

import loca_vision.diffusers  # noqa: F401
from loca_vision import remove
from support import pipelines as tiny
from support.reference_weights import Made, assert_near, expected
from support.wide_conv_in import CONV_IN, as_base, assert_as_before, everything, is_wide, pipeline, widened


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
