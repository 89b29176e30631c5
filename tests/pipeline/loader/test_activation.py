"""LoCA methods of a pipeline: activating and weighting adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loca_vision import adapters
from support.loader import BOTH, TEXT, UNET
from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    Made,
    adapter,
    assert_near,
    assert_same,
    expected,
    facts,
    listed,
)


def test_several_adapters_add_up(pipe: Any, base: Tensor, first: Made, second: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(second.state(), "second")
    for names, weights, terms in (
        (["first", "second"], None, [(first, 1.0), (second, 1.0)]),
        (["second", "first"], [0.5, -0.25], [(first, -0.25), (second, 0.5)]),
        (("first", "second"), 0.3, [(first, 0.3), (second, 0.3)]),
        (["first", "second"], [None, 2], [(first, 1.0), (second, 2.0)]),
        ("second", 0.0, []),
        ("second", None, [(second, 1.0)]),
        ([], None, []),
        ("first", [0.7], [(first, 0.7)]),
    ):
        pipe.set_loca_adapters(names, weights)
        assert pipe.get_active_loca_adapters() == ([names] if isinstance(names, str) else list(names))
        assert_near(picture(pipe), expected(*terms))
    pipe.set_loca_adapters([])
    assert torch.equal(picture(pipe), base)


def test_adapters_of_different_components_act_together(pipe: Any) -> None:
    one, other = adapter(stable_diffusion(), UNET, seed=8), adapter(stable_diffusion(), TEXT, seed=9)
    pipe.load_loca_weights(one.state(), "one")
    pipe.load_loca_weights(other.state(), "other")
    assert_near(picture(pipe), expected((other, 1.0)))
    pipe.set_loca_adapters(["one", "other"], [0.5, 2.0])
    assert sorted(pipe.get_active_loca_adapters()) == ["one", "other"]
    assert_near(picture(pipe), expected((one, 0.5), (other, 2.0)))


def test_disabled_adapters_rest_and_keep_their_weights(pipe: Any, base: Tensor, first: Made, second: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(second.state(), "second")
    pipe.set_loca_adapters(["first", "second"], [0.5, 0.25])
    shown = picture(pipe)
    for _ in range(2):
        pipe.disable_loca()
        assert torch.equal(picture(pipe), base)
        assert pipe.get_active_loca_adapters() == ["first", "second"]
    for _ in range(2):
        pipe.enable_loca()
        assert torch.equal(picture(pipe), shown)
    pipe.disable_loca()
    pipe.set_loca_adapters("first")
    assert_near(picture(pipe), expected((first, 1.0)))
    pipe.disable_loca()
    pipe.load_loca_weights(second.state(), "third")
    assert_near(picture(pipe), expected((second, 1.0)))


def test_deleting_takes_out_only_what_is_named(pipe: Any, base: Tensor, first: Made, second: Made) -> None:
    before = facts(pipe)
    for name, made in (("first", first), ("second", second), ("third", first)):
        pipe.load_loca_weights(made.state(), name)
    pipe.set_loca_adapters(["first", "second", "third"])
    pipe.delete_loca_adapters("first")
    assert pipe.get_loca_adapters() == listed(BOTH, "second", "third")
    assert pipe.get_active_loca_adapters() == ["second", "third"]
    assert_near(picture(pipe), expected((first, 1.0), (second, 1.0)))
    pipe.set_loca_adapters("third")
    pipe.delete_loca_adapters("third")
    assert pipe.get_active_loca_adapters() == []
    assert torch.equal(picture(pipe), base)
    pipe.set_loca_adapters("second")
    assert_near(picture(pipe), expected((second, 1.0)))
    pipe.delete_loca_adapters(["second"])
    assert_same(pipe, before)


def test_deleting_what_is_in_one_component(pipe: Any, first: Made) -> None:
    text = adapter(stable_diffusion(), TEXT, seed=9)
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(text.state(), "text")
    pipe.set_loca_adapters(["first", "text"])
    pipe.delete_loca_adapters(["text"])
    assert pipe.get_loca_adapters() == listed(BOTH, "first")
    assert_near(picture(pipe), expected((first, 1.0)))


@pytest.mark.parametrize("names", ["other", ["first", "other"], ["first", "first"], ["other", "another"], [7]])
def test_an_unknown_name_is_refused_and_changes_nothing(names: Any, pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    before = facts(pipe)
    words = (
        "an adapter is named twice" if names == ["first", "first"] else "no adapter (7|'other') in the pipeline; it has 'first'"
    )
    for call in (
        pipe.set_loca_adapters,
        pipe.delete_loca_adapters,
        lambda names: pipe.set_loca_device(names, "cpu"),
        lambda names: pipe.fuse_loca(adapter_names=names),
    ):
        with pytest.raises(ValueError, match=words):
            call(names)
    assert_same(pipe, before)


def test_moving_to_the_device_it_is_on_changes_nothing(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    before = facts(pipe)
    for names, device in (("first", "cpu"), (["first"], torch.device("cpu"))):
        pipe.set_loca_device(names, device)
    with pytest.raises(RuntimeError, match="nowhere"):
        pipe.set_loca_device("first", "nowhere")
    assert_same(pipe, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there_is_refused(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    before = facts(pipe)
    with pytest.raises(RuntimeError, match=r"CUDA|NVIDIA"):
        pipe.set_loca_device("first", "cuda")
    assert_same(pipe, before)


def test_only_the_named_adapters_move(pipe: Any, first: Made, second: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(second.state(), "second")
    moved = []
    for model in (pipe.unet, pipe.text_encoder):
        for name in ("first", "second"):
            for projection, spectrum in adapters(model, name).items():
                monkeypatch.setattr(spectrum, "to", lambda device, what=(name, projection): moved.append((*what, str(device))))
    pipe.set_loca_device(["second"], "cpu")
    wanted = {projection for model in (pipe.unet, pipe.text_encoder) for projection in adapters(model, "second")}
    assert set(moved) == {("second", projection, "cpu") for projection in wanted}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_spectra_on_another_device_go_on_working(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    pipe.set_loca_device("first", "cuda")
    assert all(s.coefficients.is_cuda for s in adapters(pipe.unet, "first").values())
    assert_near(picture(pipe), expected((first, 1.0)))
