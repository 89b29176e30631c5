"""Adapted attention layers of diffusers and transformers: together with other libraries."""

from functools import cache

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from loca_vision import adapters, inject, load_adapter, remove, save_adapter, set_adapters
from support import pipelines as tiny
from support.attention import (
    COMPANY,
    CONFIG,
    CPU,
    FAMILIES,
    adapted,
    alone,
    arrivals,
    assert_gradients_near,
    assert_near,
    base_output,
    classes,
    effective_weights,
    expected,
    gradients,
    inputs,
    layer_path,
    lora,
    loss_of,
    no_hooks_of_accelerate,
    output,
    shown,
    small,
    written,
)

in_company = pytest.mark.parametrize("company", COMPANY)


@cache
def expected_in(company):
    oracle = written(small(), adapters(adapted("small")))
    COMPANY[company][0](oracle)
    return output(oracle)


@in_company
@arrivals
@pytest.mark.parametrize("departure", ("first", "last"))
def test_in_company(company, arrival, departure):
    """`arrival` and `departure` are those of the others."""
    join, leave = COMPANY[company]
    model = small()
    if arrival == "before":
        join(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        join(model)
    for _ in range(2):
        assert_near(output(model), expected_in(company))
    if departure == "first":
        leave(model)
        assert_near(output(model), expected("small"))
        remove(model)
    else:
        remove(model)
        assert torch.equal(output(model), alone(company))
        leave(model)
    assert torch.equal(output(model), base_output("small"))
    assert classes(model) == classes(small())


@in_company
def test_after_company_has_left(company):
    """Hooks leave the method they found on the layer itself, where it hides that of the class."""
    join, leave = COMPANY[company]
    model = small()
    join(model)
    leave(model)
    inject(model, CONFIG)
    assert_near(output(shown(model)), expected("small"))
    remove(model)
    assert torch.equal(output(model), base_output("small"))


@in_company
def test_strength_of_a_call_in_company(company):
    join, _ = COMPANY[company]
    model, oracle = adapted("small"), written(small(), adapters(adapted("small")), strength=0.3)
    join(model)
    join(oracle)
    scale = {"cross_attention_kwargs": {"scale": 0.3}}
    wanted = output(oracle, **scale) if company == "lora" else output(oracle)
    assert_near(output(model, **scale), wanted)


OFFLOADED = pytest.mark.parametrize("company", [name for name in COMPANY if "offload" in name])


@OFFLOADED
def test_saving_while_offloaded(company, tmp_path):
    model = adapted("small")
    before = load_file(save_adapter(model, tmp_path / "before"))
    join, _ = COMPANY[company]
    join(model)
    output(model)
    during = load_file(save_adapter(model, tmp_path / "during"))
    assert before.keys() == during.keys()
    assert all(torch.equal(before[key], during[key]) for key in before)
    other = small()
    join(other)
    load_adapter(other, tmp_path / "during")
    fresh = small()
    load_adapter(fresh, tmp_path / "before")
    assert_near(output(other), output(fresh))
    assert (output(fresh) - base_output("small")).abs().max() > 1e-2


@OFFLOADED
def test_whole_tensors_of_an_offloaded_model(company, tmp_path):
    model = adapted("small")
    model.conv_in.requires_grad_(True)
    with torch.no_grad():
        model.conv_in.weight.mul_(1.5)
    saved = load_file(save_adapter(model, tmp_path))
    assert {"full.conv_in.weight", "full.conv_in.bias"} <= saved.keys()
    fresh, other = small(), small()
    load_adapter(fresh, tmp_path)
    assert not torch.equal(fresh.conv_in.weight, small().conv_in.weight)
    join, _ = COMPANY[company]
    join(other)
    load_adapter(other, tmp_path)
    assert_near(output(other), output(fresh))
    set_adapters(other, [])
    assert torch.equal(output(other), base_output("small"))
    set_adapters(other, "default")
    assert_near(output(other), output(fresh))
    again = load_file(save_adapter(other, tmp_path / "again"))
    assert again.keys() == saved.keys() and all(torch.equal(again[key], saved[key]) for key in saved)
    remove(other)
    assert torch.equal(output(other), base_output("small"))


def test_merging_into_an_offloaded_model():
    model = adapted()
    cpu_offload(model, execution_device=CPU)
    remove(model, merge=True)
    assert_near(output(model), expected())
    no_hooks_of_accelerate(model)
    assert_near(output(model), expected())


def test_nothing_is_kept_for_a_layer_that_is_offloaded():
    model = adapted()
    cpu_offload(model, execution_device=CPU)
    assert_near(output(model), expected())
    assert next(model.parameters()).device.type == "meta"
    assert all(weight._cached is None and weight.delta is None for weight in effective_weights(model))


def cast(model):
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return model


@arrivals
def test_layerwise_casting(arrival):
    """The base is rounded to eight bits, the adapter is not."""
    model, rounded = tiny.unet(), tiny.unet()
    if arrival == "before":
        cast(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        cast(model)
    rounded.load_state_dict({key: value.float() for key, value in cast(tiny.unet()).state_dict().items()})
    base = output(rounded)
    assert model.get_submodule(layer_path(next(iter(adapters(model))))).weight.dtype == torch.float8_e4m3fn
    assert (base - base_output("unet")).abs().max() > 1e-3
    assert_near(output(model), output(written(rounded, adapters(adapted()))))
    for spectrum, exact in zip(adapters(model).values(), adapters(adapted()).values(), strict=True):
        assert torch.equal(spectrum.coefficients, exact.coefficients)
        assert torch.equal(spectrum.locations, exact.locations)
    with pytest.raises(ValueError, match="nothing can be written into it"):
        remove(model, merge=True)
    remove(model)
    assert torch.equal(output(model), base)


def test_lora_takes_only_layers_of_the_model():
    """peft looks for modules whose path ends in a name, such as the `q` of T5."""
    for family, names in (("t5", ["q", "k", "v", "o"]), ("clip", ["q_proj", "out_proj"]), ("unet", ["to_q", "to_out.0"])):
        model, base = adapted(family), FAMILIES[family]()
        for one in (model, base):
            torch.manual_seed(3)
            one.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
        wrapped = [[path for path, m in one.named_modules() if isinstance(m, LoraLayer)] for one in (model, base)]
        assert wrapped[0] == wrapped[1]


def test_gradients_together_with_lora():
    spectra = adapters(adapted(learned=True))
    model, base = shown(lora(adapted()), learned=True), lora(tiny.unet())  # peft freezes all but its own
    values = dict(base.named_parameters())
    for projection, spectrum in spectra.items():
        key = f"{layer_path(projection)}.base_layer.weight"
        values[key] = values[key].detach() + spectrum.delta()
    answer = torch.func.functional_call(base, values, kwargs=inputs(base) | {"return_dict": False})[0]
    learned = [value for s in spectra.values() for value in (s.coefficients, s.locations)]
    assert_gradients_near(gradients(model), torch.autograd.grad(loss_of(answer), learned))


def test_half_precision_together_with_lora():
    model, oracle, base = lora(adapted()), lora(written(tiny.unet(), adapters(adapted()))), lora(tiny.unet())
    exact, effect = output(oracle), (output(oracle) - output(base)).abs().max()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (output(model) - exact).abs().max() < 0.2 * effect
    given = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs(model).items()}
    with torch.no_grad():
        half = model.to(torch.bfloat16)(**given, return_dict=False)[0]
    assert half.dtype == torch.bfloat16
    assert (half - exact).abs().max() < 0.2 * effect


def test_merging_under_lora():
    model, oracle = lora(adapted()), lora(written(tiny.unet(), adapters(adapted())))
    remove(model, merge=True)
    assert_near(output(model), output(oracle))
    model.unload_lora()
    assert_near(output(model), expected())
