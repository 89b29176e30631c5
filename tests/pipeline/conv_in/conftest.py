"""Fixtures of the tests in pipeline/conv_in/."""

from __future__ import annotations

import pytest
from torch import Tensor

import loca_vision.diffusers  # noqa: F401
from support import pipelines as tiny
from support.reference_weights import Made, adapter
from support.wide_conv_in import CONV_IN, UNET, pipeline, widened


@pytest.fixture(scope="module")
def wide() -> Made:
    return adapter(widened(), UNET, seed=1, whole=CONV_IN)


@pytest.fixture(scope="module")
def other() -> Made:
    return adapter(widened(), UNET, seed=2, whole=CONV_IN)


@pytest.fixture(scope="module")
def plain() -> Made:
    """Made for four channels, with nothing trained whole."""
    return adapter(pipeline(), UNET, seed=3)


@pytest.fixture(scope="module")
def narrow() -> Made:
    """Made for four channels, with a `conv_in` of its own."""
    return adapter(pipeline(), UNET, seed=4, whole=CONV_IN)


@pytest.fixture(scope="module")
def base() -> Tensor:
    """What the base shows once it takes eight channels."""
    return tiny.picture(widened())


@pytest.fixture(scope="module")
def wanted(wide: Made) -> Tensor:
    """What the adapter shows on a UNet that was widened by hand."""
    pipe = widened()
    pipe.load_loca_weights(wide.state())
    return tiny.picture(pipe)
