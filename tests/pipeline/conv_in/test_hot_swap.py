"""An eight-channel conv_in in a four-channel UNet: hot swapping."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import loca_vision.diffusers  # noqa: F401
from loca_vision.pipeline import load as loading
from support import pipelines as tiny
from support.reference_weights import Made, assert_near, expected
from support.wide_conv_in import CONV_IN, as_base, assert_as_before, everything, is_wide, pipeline


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
