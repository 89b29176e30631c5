"""LoCA methods of a pipeline: copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionPipeline,
)
from torch import Tensor

from support.pipelines import picture
from support.reference_weights import (
    Made,
    assert_near,
    expected,
)


def copied(pipe: Any) -> Any:
    return copy.deepcopy(pipe)


def pickled(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("copying", [copied, pickled])
def test_a_copy_has_adapters_of_its_own(copying: Callable[[Any], Any], pipe: Any, base: Tensor, first: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    shown = picture(pipe)
    other = copying(pipe)
    assert torch.equal(picture(other), shown)
    assert_near(picture(other, cross_attention_kwargs={"scale": 0.5}), expected((first, 0.5)))
    other.set_loca_adapters("first", 0.5)
    assert torch.equal(picture(pipe), shown)
    assert_near(picture(other), expected((first, 0.5)))
    other.unload_loca_weights()
    assert torch.equal(picture(other), base) and torch.equal(picture(pipe), shown)
    assert (other.get_loca_adapters(), pipe.get_active_loca_adapters()) == ({}, ["first"])
    assert type(other) is StableDiffusionPipeline
