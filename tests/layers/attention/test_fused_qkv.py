"""Adapted attention layers of diffusers and transformers: fused query, key and value."""

import pytest
import torch

from loca_vision import inject, remove, set_adapters
from support.attention import (
    CONFIG,
    FAMILIES,
    adapted,
    arrivals,
    assert_gradients_near,
    assert_near,
    base_output,
    classes,
    expected,
    gradients,
    output,
    reference_gradients,
    shown,
)

FUSABLE = pytest.mark.parametrize("family", ("unet", "sdxl", "sd3", "flux", "pixart", "vae"))


def fused(model):
    return [m for m in model.modules() if any(name in m._modules for name in ("to_qkv", "to_kv", "to_added_qkv"))]


@FUSABLE
@arrivals
def test_fused_projections_are_adapted(family, arrival):
    model = FAMILIES[family]()
    if arrival == "before":
        model.fuse_qkv_projections()
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        model.fuse_qkv_projections()
    assert fused(model)
    assert_near(output(model), expected(family))
    set_adapters(model, "default", 0.5)
    assert_near(output(model), expected(family, 0.5))
    set_adapters(model, "default")
    model.unfuse_qkv_projections()
    assert_near(output(model), expected(family))
    remove(model)
    assert torch.equal(output(model), base_output(family))


@FUSABLE
@arrivals
def test_removal_while_fused(family, arrival):
    model, base = FAMILIES[family](), FAMILIES[family]()
    base.fuse_qkv_projections()
    if arrival == "before":
        model.fuse_qkv_projections()
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        model.fuse_qkv_projections()
    assert_near(output(model), expected(family))
    remove(model)
    assert classes(model) == classes(base)
    assert torch.equal(output(model), output(base))


@FUSABLE
def test_merging_while_fused_writes_both(family):
    model = adapted(family)
    model.fuse_qkv_projections()
    remove(model, merge=True)
    assert_near(output(model), expected(family))
    model.unfuse_qkv_projections()
    assert_near(output(model), expected(family))


def test_gradients_through_fused_projections():
    for family in ("unet", "flux"):
        model = adapted(family, learned=True)
        model.fuse_qkv_projections()
        assert_gradients_near(gradients(model), reference_gradients(family))
