"""Adapted attention layers of diffusers and transformers: removal."""

import pytest
import torch

from loca_vision import adapters, inject, remove, set_adapters
from support.attention import (
    CONFIG,
    FAMILIES,
    adapted,
    anatomy,
    assert_near,
    base_output,
    classes,
    every_family,
    expected,
    gradients,
    output,
    shown,
    written,
)


@every_family
@pytest.mark.parametrize("called", (False, True), ids=("unused", "used"))
def test_removal_leaves_no_trace(family, called):
    model = FAMILIES[family]()
    before, tensors = anatomy(model), {key: value.clone() for key, value in model.state_dict().items()}
    learned = {name: p.requires_grad for name, p in model.named_parameters()}
    held = {name: id(p) for name, p in model.named_parameters()}
    inject(model, CONFIG)
    shown(model, learned=True)
    if called:
        gradients(model)
        output(model)
    assert classes(model) != {path: cls for path, (cls, _) in before.items()}
    remove(model)
    assert anatomy(model) == before
    assert list(model.state_dict()) == list(tensors)
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learned
    assert {name: id(p) for name, p in model.named_parameters()} == held
    assert torch.equal(output(model), base_output(family))


@every_family
def test_merged_weights_are_the_written_ones(family):
    model = adapted(family)
    oracle = written(FAMILIES[family](), adapters(model), family, 0.5)
    set_adapters(model, "default", 0.5)
    remove(model, merge=True)
    assert classes(model) == classes(oracle)
    assert list(model.state_dict()) == list(oracle.state_dict())
    for key, value in oracle.state_dict().items():
        assert_near(model.state_dict()[key], value, 1e-6)
    assert_near(output(model), expected(family, 0.5))
