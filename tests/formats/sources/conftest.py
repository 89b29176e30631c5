"""Fixtures of the tests in formats/sources/."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    Made,
    adapter,
    assert_far,
    expected,
    facts,
)
from support.sources import PARTS


@pytest.fixture
def pipe() -> Any:
    return stable_diffusion()


@pytest.fixture(scope="module")
def made() -> Made:
    return adapter(stable_diffusion(), PARTS)


@pytest.fixture(scope="module")
def wanted(made: Made) -> Tensor:
    shown = expected((made, 1.0))
    assert_far(shown, picture(stable_diffusion()))
    return shown


@pytest.fixture(scope="module")
def still() -> tuple[Any, dict[str, Any]]:
    """A pipeline with an adapter, that no test here may change, since all loads into it are refused; and its facts."""
    pipe = stable_diffusion()
    pipe.load_loca_weights(adapter(stable_diffusion(), PARTS, seed=7).state(), "here")
    pipe.set_loca_adapters("here", {"unet": {"down": 0.5}, "text_encoder": 0.25})
    return pipe, facts(pipe)
