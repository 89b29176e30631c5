"""Adapted attention layers of diffusers and transformers: precision."""

import pytest
import torch

from loca_vision import adapters, inject, set_adapters
from loca_vision.model.call_scale import set_low_memory
from support import pipelines as tiny
from support.attention import (
    CONFIG,
    FAMILIES,
    KEYWORD,
    adapted,
    arrivals,
    assert_gradients_near,
    assert_near,
    attention_layers,
    call,
    effective_weights,
    expected,
    gradients,
    inputs,
    loss_of,
    output,
    reference_gradients,
    shown,
    written,
)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("family", ("unet", "flux", "clip"))
def test_half_precision_models_keep_exact_adapters(family, dtype):
    model, exact = adapted(family).to(dtype), adapters(adapted(family))
    for projection, spectrum in adapters(model).items():
        assert torch.equal(spectrum.coefficients, exact[projection].coefficients)
        assert torch.equal(spectrum.locations, exact[projection].locations)
    oracle = written(FAMILIES[family]().to(dtype), exact, family)
    given = {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs(model).items()}
    with torch.no_grad():
        got, wanted = (one(**given, return_dict=False)[0] for one in (model, oracle))
    assert got.dtype == dtype
    assert torch.equal(got, wanted)  # the sum is rounded once


def test_autocast():
    model, oracle, base = adapted(), written(tiny.unet(), adapters(adapted())), tiny.unet()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, wanted, bare = output(model), output(oracle), output(base)
    assert torch.equal(got, wanted)
    assert not torch.equal(got, bare)
    exact = gradients(shown(model, learned=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = gradients(model)
    assert all(gradient.dtype == torch.float32 for gradient in rough)
    assert_gradients_near(rough, exact, 0.1)


@pytest.mark.parametrize("family", ("unet", "sd3", "clip"))
def test_without_gradients_a_weight_is_built_once(family, builds):
    model = adapted(family)
    first = output(model)
    once = len(builds)
    assert torch.equal(output(model), first)
    with torch.inference_mode():
        assert torch.equal(call(model), first)
    assert len(builds) == once == len(adapters(model))
    set_adapters(model, "default", 0.5)
    assert_near(output(model), expected(family, 0.5))
    assert len(builds) == 2 * once


def test_a_kept_weight_follows_every_change(builds):
    model = adapted()
    output(model)
    for spectrum in adapters(model).values():
        spectrum.coefficients.data.mul_(2)
        spectrum.locations.data.copy_(1 - spectrum.locations)
    assert_near(output(model), output(written(tiny.unet(), adapters(model))))
    with torch.no_grad():
        for layer in attention_layers(model):
            layer.to_v.weight.mul_(1.5)
    base = tiny.unet()
    for layer in attention_layers(base):
        layer.to_v.weight.data.mul_(1.5)
    assert_near(output(model), output(written(base, adapters(model))))


def test_fused_weights_are_built_once(builds):
    model = adapted()
    model.fuse_qkv_projections()
    first = output(model)
    once = len(builds)
    assert torch.equal(output(model), first)
    assert 0 < len(builds) == once < len(adapters(model))


def test_training_does_not_keep_weights():
    model = adapted(learned=True)
    output(model)
    assert sum(weight._cached is not None for weight in effective_weights(model)) == len(adapters(model))
    gradients(model)
    assert all(weight._cached is None for weight in effective_weights(model))


def input_gradient(model):
    given = inputs(model)
    name = "sample" if "sample" in given else "hidden_states"
    given[name] = given[name].clone().requires_grad_()
    loss_of(model(**given, return_dict=False)[0]).backward()
    return given[name].grad


@pytest.mark.parametrize("family", ("unet", "sd3", "flux"))
@arrivals
def test_low_memory(family, arrival):
    model = FAMILIES[family]()
    if arrival == "before":
        set_low_memory(model, True)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        output(model)
        set_low_memory(model, True)
    assert_near(output(model), expected(family))
    assert_near(output(model, **{KEYWORD[family]: {"scale": 0.3}}), expected(family, 0.3))
    got = input_gradient(model)
    assert all(weight._cached is None and weight.delta is None for weight in effective_weights(model))
    assert_near(got, input_gradient(written(FAMILIES[family](), adapters(model), family)), 1e-4)
    set_low_memory(model, False)
    output(model)
    assert any(weight._cached is not None for weight in effective_weights(model))


def test_low_memory_builds_nothing(builds):
    model = adapted()
    set_low_memory(model, True)
    output(model)
    assert not builds
    model.fuse_qkv_projections()
    assert_near(output(model), expected())
    assert not builds


def test_low_memory_still_learns():
    model = adapted(learned=True)
    set_low_memory(model, True)
    assert_gradients_near(gradients(model), reference_gradients("unet"))
