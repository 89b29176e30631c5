"""An eight-channel conv_in in a four-channel UNet: refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import loca_vision.diffusers  # noqa: F401
from loca_vision import LoCAConfig, inject, load_adapter, save_adapter, set_adapters
from loca_vision.model.conv_in import widen_conv_in
from support import pipelines as tiny
from support.reference_weights import Made
from support.wide_conv_in import CONV_IN, assert_as_before, everything, is_wide, pipeline


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
