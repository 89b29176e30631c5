"""LoCA methods of a pipeline: low memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.pipelines import picture
from support.reference_weights import (
    Made,
    assert_near,
    expected,
)


def test_less_memory_gives_the_same_picture(pipe: Any, base: Tensor, first: Made, second: Made) -> None:
    pipe.enable_loca_low_memory()
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(second.state(), "second")
    pipe.set_loca_adapters(["first", "second"], [0.5, 0.25])
    assert_near(picture(pipe), expected((first, 0.5), (second, 0.25)))
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    assert_near(picture(pipe, cross_attention_kwargs={"scale": 2.0}), expected((first, 1.0), (second, 0.5)))
    pipe.enable_loca_low_memory(False)
    assert_near(picture(pipe), expected((first, 0.5), (second, 0.25)))
