"""An eight-channel conv_in in a four-channel UNet: activation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import loca_vision.diffusers  # noqa: F401
from loca_vision import LoCAConfig, inject, load_adapter, save_adapter
from support import pipelines as tiny
from support.reference_weights import Made, assert_near, expected
from support.wide_conv_in import CONV_IN, as_base, assert_as_before, everything, is_wide, pipeline, trained, widened


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
def test_together_with_one_for_four_channels(order: str, leaving: str, wide: Made, plain: Made, base: Tensor) -> None:
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
