"""Adapted attention layers of diffusers and transformers: torch.compile."""

import contextlib
from functools import partial

import pytest
import torch

from loca_vision import adapters, inject, set_adapters
from loca_vision.model.call_scale import set_low_memory
from support.attention import (
    CONFIG,
    adapted,
    arrivals,
    assert_gradients_near,
    assert_near,
    attention_layers,
    call,
    effective_weights,
    expected,
    gradients,
    lora,
    loss_of,
    output,
    shown,
    small,
    written,
)


@contextlib.contextmanager
def nothing_compiled_anew():
    with torch.compiler.set_stance("fail_on_recompile"):
        yield


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield partial(torch.compile, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@pytest.fixture
def whole_model_compiler(compiler):
    """For whole models, without the tracing of gradients, which takes as long again: single layers and training have that."""
    return partial(torch.compile, fullgraph=True, backend="eager")


def small_oracle(model, strength=1.0):
    return output(written(small(), adapters(model), strength=strength))


@pytest.mark.filterwarnings("ignore")  # of the compiler's own making
@arrivals
def test_compiled(whole_model_compiler, arrival):
    """`arrival` of the compiler. Afterwards other weights, and other scales of a call, compile nothing anew."""
    model = small()
    if arrival == "before":
        compiled = whole_model_compiler(model)
        assert torch.equal(output(compiled), output(small()))
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        compiled = whole_model_compiler(model)
    assert_near(output(compiled), small_oracle(model))
    with nothing_compiled_anew():
        set_adapters(compiled, "default", 0.5)
        assert_near(output(compiled), small_oracle(model, 0.5))
        set_adapters(compiled, [])
        assert_near(output(compiled), output(small()), 1e-6)
        set_adapters(compiled, "default")
        assert_near(output(compiled), small_oracle(model))
    if arrival == "before":
        return
    assert_near(output(compiled, cross_attention_kwargs={"scale": 0.5}), small_oracle(model, 0.5))
    assert_near(output(compiled, cross_attention_kwargs={"scale": 0.3}), small_oracle(model, 0.3))
    with nothing_compiled_anew():
        assert_near(output(compiled, cross_attention_kwargs={"scale": 0.7}), small_oracle(model, 0.7))
        assert_near(output(compiled), small_oracle(model))


@pytest.mark.filterwarnings("ignore")
def test_training_compiled(compiler):
    model = small()
    inject(model, CONFIG)
    exact = gradients(shown(model, learned=True))
    compiled = compiler(model)
    assert_gradients_near(gradients(compiled), exact)
    with torch.no_grad():
        for spectrum in adapters(model).values():
            spectrum.coefficients.mul_(2)
            spectrum.locations.copy_(1 - spectrum.locations)
    assert_near(call(compiled).detach(), small_oracle(model))


@pytest.mark.filterwarnings("ignore")
def test_training_a_frozen_adapter_that_was_compiled(compiler):
    model = small()
    inject(model, CONFIG)
    layer, x = attention_layers(shown(model))[0], torch.randn(2, 5, 16)
    compiled = compiler(layer)
    compiled(x)
    spectra = list(adapters(model).values())[:4]
    for spectrum in spectra:
        spectrum.requires_grad_(True)
    learned = [value for s in spectra for value in (s.coefficients, s.locations)]
    exact = torch.autograd.grad(loss_of(layer(x)), learned)
    assert_gradients_near(torch.autograd.grad(loss_of(compiled(x)), learned), exact)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ("flux", "clip"))
def test_other_models_compiled(whole_model_compiler, family):
    model = adapted(family)
    compiled = whole_model_compiler(model)
    assert_near(output(compiled), expected(family))
    with nothing_compiled_anew():
        set_adapters(model, "default", 0.5)
        assert_near(output(compiled), expected(family, 0.5))


BESIDE = {"fused": lambda m: m.fuse_qkv_projections(), "lora": lambda m: lora(m)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", BESIDE.values(), ids=BESIDE)
@arrivals
def test_one_layer_compiled(compiler, change, arrival):
    model, x = small(), torch.randn(2, 5, 16)
    if arrival == "before":
        change(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        change(model)
    compiled = compiler(attention_layers(model)[0])
    for strength in (1.0, 0.5, 0.0):
        set_adapters(model, "default", strength)
        oracle = written(small(), adapters(model), strength=strength)
        change(oracle)
        with torch.no_grad():
            assert_near(compiled(x), attention_layers(oracle)[0](x))


@pytest.mark.filterwarnings("ignore")
def test_one_layer_compiled_in_low_memory(compiler):
    model, x = small(), torch.randn(2, 5, 16)
    inject(model, CONFIG)
    set_low_memory(shown(model), True)
    layer, oracle = attention_layers(model)[0], attention_layers(written(small(), adapters(model)))[0]
    with torch.no_grad():
        assert_near(compiler(layer)(x), oracle(x))
    assert all(weight._cached is None and weight.delta is None for weight in effective_weights(model))


@pytest.mark.filterwarnings("ignore")
@arrivals
def test_regional_compilation(compiler, arrival):
    model = small()
    model._repeated_blocks = ["BasicTransformerBlock"]
    if arrival == "before":
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        output(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert_near(output(model), small_oracle(model))
