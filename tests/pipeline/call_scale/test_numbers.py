"""What is a number: the scale of a call, and the weights of adapters."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from loca_vision import set_adapters
from loca_vision.checks import as_number
from support.loader import BOTH, shown
from support.pipelines import picture, stable_diffusion
from support.reference_weights import Made, adapter, assert_near, expected

HALVES = [np.float32(0.5), np.float64(0.5), np.float16(0.5), np.array(0.5), Fraction(1, 2), torch.tensor(0.5)]
ONES = [np.int64(1), np.uint8(1), torch.tensor(1), torch.tensor(1.0, dtype=torch.bfloat16)]
NONE = [
    True,
    np.True_,
    torch.tensor(True),
    math.nan,
    np.float32("nan"),
    torch.tensor(math.inf),
    10**400,
    "0.5",
    np.str_("0.5"),
    None,
    1j,
    np.complex64(1),
    torch.tensor(1j),
    [0.5],
    np.array([0.5]),
    torch.tensor([0.5]),
    torch.tensor(0.5, device="meta"),
    nn.Parameter(torch.tensor(0.5)),
]
halves = pytest.mark.parametrize("half", HALVES, ids=lambda value: f"{type(value).__name__} {value}")


@pytest.fixture(scope="module")
def made() -> Made:
    return adapter(stable_diffusion(), BOTH, seed=4, size=0.5)


@pytest.fixture(scope="module")
def wanted(made: Made) -> Tensor:
    return expected((made, 0.5))


@pytest.fixture
def pipe(made: Made) -> Any:
    pipe = stable_diffusion()
    pipe.load_loca_weights(made.state(), "a")
    return pipe


def test_what_is_a_number() -> None:
    assert [as_number(value) for value in HALVES] == [0.5] * len(HALVES)
    assert [as_number(value) for value in ONES] == [1.0] * len(ONES)
    assert all(type(as_number(value)) is float for value in (*HALVES, *ONES))


@pytest.mark.parametrize("value", NONE, ids=lambda value: f"{type(value).__name__} {value}"[:30])
def test_what_is_none(value: Any) -> None:
    assert as_number(value) is None


@halves
def test_scale_of_a_call(half: Any, pipe: Any, wanted: Tensor) -> None:
    given = {"scale": half}
    assert_near(picture(pipe, cross_attention_kwargs=given), wanted)
    assert given["scale"] is half
    with torch.no_grad():
        words = pipe.encode_prompt("a cat", "cpu", 1, False, lora_scale=half)[0]
        assert_near(words, pipe.encode_prompt("a cat", "cpu", 1, False, lora_scale=0.5)[0])


@halves
def test_weights_of_a_pipeline(half: Any, pipe: Any, wanted: Tensor) -> None:
    for weights in (half, [half], {"unet": half, "text_encoder": half}, {"unet": {"down": half, "mid": [half], "up": half}}):
        pipe.set_loca_adapters("a", weights)
        if isinstance(weights, dict) and "text_encoder" not in weights:
            pipe.set_loca_adapters("a", weights | {"text_encoder": half})
        assert_near(picture(pipe), wanted)
    pipe.set_loca_adapters("a", {"unet": {"up": {"block_0": [half, half]}}})
    pipe.set_loca_adapters("a")
    pipe.fuse_loca(scale=half)
    assert_near(picture(pipe), wanted)


@halves
def test_weights_of_a_model(half: Any, pipe: Any, wanted: Tensor) -> None:
    for weights in (half, [half], {"a": half}):
        for model in (pipe.unet, pipe.text_encoder):
            set_adapters(model, "a", weights)
        assert_near(picture(pipe), wanted)


@pytest.mark.parametrize("value", [np.True_, torch.tensor(math.nan), "0.5", torch.tensor([0.5, 0.5])], ids=str)
def test_others_are_refused_everywhere(value: Any, pipe: Any) -> None:
    before = picture(pipe)
    for refused in (
        lambda: picture(pipe, cross_attention_kwargs={"scale": value}),
        lambda: pipe.set_loca_adapters("a", value),
        lambda: pipe.set_loca_adapters("a", {"unet": {"mid": value}}),
        lambda: set_adapters(pipe.unet, "a", value),
        lambda: set_adapters(pipe.unet, "a", [value]),
        lambda: pipe.fuse_loca(scale=value),
    ):
        with pytest.raises(ValueError, match=r"finite number|2 weights for 1 adapters"):
            refused()
    assert torch.equal(picture(pipe), before)


def test_compiled_models_take_them(pipe: Any, wanted: Tensor) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    for half in (np.float32(0.5), torch.tensor(0.5)):
        assert_near(picture(pipe, cross_attention_kwargs={"scale": half}), wanted)
    assert_near(shown(pipe), expected_full(pipe))


def expected_full(pipe: Any) -> Tensor:
    pipe.unet = pipe.unet._orig_mod
    return picture(pipe)
