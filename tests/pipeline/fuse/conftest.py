"""Fixtures of the tests in pipeline/fuse/."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from support.fusing import BOTH
from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    Made,
    adapter,
)


@pytest.fixture(scope="module")
def base() -> Tensor:
    return picture(stable_diffusion())


@pytest.fixture(scope="module")
def a() -> Made:
    return adapter(stable_diffusion(), BOTH, seed=1)


@pytest.fixture(scope="module")
def b() -> Made:
    return adapter(stable_diffusion(), {"unet": ("v", "out"), "text_encoder": ("k",)}, seed=2, scale=0.7, n=20)


@pytest.fixture
def pipe(a: Made) -> Any:
    """With the adapter `a`."""
    pipe = stable_diffusion()
    pipe.load_loca_weights(a.state(), "a")
    return pipe


@pytest.fixture
def two(pipe: Any, b: Made) -> Any:
    """With the adapters `a` at 0.5 and `b` at 0.25."""
    pipe.load_loca_weights(b.state(), "b")
    pipe.set_loca_adapters(["a", "b"], [0.5, 0.25])
    return pipe
