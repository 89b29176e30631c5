"""Targets, comparisons and a failing function for the tests in pipeline/fuse/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from support.reference_weights import (
    models,
)

BOTH = {"unet": ("q", "v"), "text_encoder": ("q", "out")}


UNET = {"unet": ("q", "v")}


CONV_IN = ["unet.conv_in.weight", "unet.conv_in.bias"]


PRECISIONS = [torch.float32, torch.float16, torch.bfloat16]


def weights_of(pipe: Any) -> dict[str, Tensor]:
    return {f"{c}.{key}": value.clone() for c, model in models(pipe).items() for key, value in model.state_dict().items()}


def assert_equal(pipe: Any, weights: dict[str, Tensor]) -> None:
    after = weights_of(pipe)
    assert list(after) == list(weights)
    for key, value in weights.items():
        assert after[key].dtype == value.dtype and torch.equal(after[key], value), key


class Failing:
    """Wraps a function so that its n-th call fails."""

    def __init__(self, function: Callable[..., Any], at: int) -> None:
        self.function, self.left = function, at

    def __call__(self, *args: Any, **named: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("no memory left")
        return self.function(*args, **named)
