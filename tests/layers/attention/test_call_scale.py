"""Adapted attention layers of diffusers and transformers: the scale of a call."""

import logging

import pytest
import torch

from loca_vision import remove, set_adapters
from support.attention import KEYWORD, adapted, assert_near, base_output, expected, output


@pytest.fixture
def diffusers_log(caplog):
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("family", KEYWORD)
def test_strength_of_a_call(family, diffusers_log):
    model, keyword = adapted(family), KEYWORD[family]
    assert torch.equal(output(model, **{keyword: {"scale": 0}}), base_output(family))
    assert torch.equal(output(model, **{keyword: {"scale": 0.0}}), base_output(family))
    given = {"scale": 0.3}
    assert_near(output(model, **{keyword: given}), expected(family, 0.3))
    assert given == {"scale": 0.3}
    assert_near(output(model), expected(family))
    set_adapters(model, "default", 0.6)
    assert_near(output(model, **{keyword: {"scale": 0.5}}), expected(family, 0.3))
    assert_near(output(model, **{keyword: None}), expected(family, 0.6))
    assert not [record for record in diffusers_log.records if record.levelno >= logging.WARNING]


def test_strength_of_a_call_while_fused():
    for family in ("unet", "flux"):
        model = adapted(family)
        model.fuse_qkv_projections()
        assert_near(output(model, **{KEYWORD[family]: {"scale": 0.3}}), expected(family, 0.3))
        assert_near(output(model), expected(family))


@pytest.mark.parametrize("scale", (float("nan"), float("inf"), "0.5", True))
def test_a_strength_that_is_no_finite_number_is_refused(scale):
    model = adapted()
    with pytest.raises(ValueError, match=r"scale=.*finite number"):
        output(model, cross_attention_kwargs={"scale": scale})
    assert_near(output(model), expected())


def test_after_removal_the_strength_of_a_call_means_nothing():
    model = adapted()
    output(model, cross_attention_kwargs={"scale": 0.3})
    remove(model)
    assert torch.equal(output(model, cross_attention_kwargs={"scale": 0.3}), base_output("unet"))
