"""LoCA methods of a pipeline: failures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from loca_vision.pipeline import load as loading
from support.loader import BOTH
from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    Made,
    adapter,
    assert_near,
    assert_same,
    expected,
    facts,
)


def failing(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Like the function, but the call of that number is an error."""
    calls = 0

    def fails(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise RuntimeError("no memory left")
        return function(*args, **named)

    return fails


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "with another adapter"])
@pytest.mark.parametrize(
    ("what", "at"),
    [
        ("loca_vision.pipeline.load.attach", 2),
        ("loca_vision.pipeline.load.prepared", 2),
        ("loca_vision.pipeline.load.activate", 2),
        ("loca_vision.model.inject.updates_of", 3),
        ("loca_vision.model.inject.updates_of", 12),
        ("loca_vision.model.inject.strengthen", 2),
    ],
)
def test_a_load_that_fails_half_way_changes_nothing(
    what: str, at: int, adapted: bool, pipe: Any, first: Made, second: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    if adapted:
        pipe.load_loca_weights(second.state(), "second")
        pipe.load_loca_weights(second.state(), "third")
        pipe.set_loca_adapters(["third", "second"], [0.5, 0.25])
        pipe.disable_loca()
    before = facts(pipe)
    module, _, name = what.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[module], name, failing(getattr(sys.modules[module], name), at))
        with pytest.raises(RuntimeError, match="no memory left"):
            pipe.load_loca_weights(first.state(), "first")
    assert_same(pipe, before)
    if adapted:
        pipe.enable_loca()
        assert_near(picture(pipe), expected((second, 0.75)))
    pipe.load_loca_weights(first.state(), "first")
    assert_near(picture(pipe), expected((first, 1.0)))


def test_a_load_that_fails_half_way_keeps_whole_tensors(pipe: Any, first: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = adapter(stable_diffusion(), BOTH, seed=6, whole=["unet.conv_in.weight"])
    pipe.load_loca_weights(whole.state(), "whole")
    before = facts(pipe)
    other = adapter(stable_diffusion(), BOTH, seed=7, whole=["unet.conv_in.weight", "unet.conv_in.bias"])
    with monkeypatch.context() as patch:
        patch.setattr(loading, "activate", failing(loading.activate, 2))
        with pytest.raises(RuntimeError, match="no memory left"):
            pipe.load_loca_weights(other.state(), "other")
    assert_same(pipe, before)
    pipe.unload_loca_weights()
    assert torch.equal(pipe.unet.conv_in.bias, stable_diffusion().unet.conv_in.bias)
