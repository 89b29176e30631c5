"""Fixtures of the tests in pipeline/loader/."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from support.loader import BOTH
from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    Made,
    adapter,
)


@pytest.fixture
def pipe() -> Any:
    return stable_diffusion()


@pytest.fixture(scope="module")
def base() -> Tensor:
    return picture(stable_diffusion())


@pytest.fixture(scope="module")
def first() -> Made:
    return adapter(stable_diffusion(), BOTH, seed=1, name="first")


@pytest.fixture(scope="module")
def second() -> Made:
    return adapter(stable_diffusion(), {"unet": ("k", "v", "out"), "text_encoder": ("q",)}, seed=2, scale=0.7, n=20)


@pytest.fixture(scope="module")
def bare() -> Any:
    """A pipeline that no test here may change, since nothing is asked of it that can be done."""
    return stable_diffusion()
