"""Adapted attention layers of diffusers and transformers: outputs."""

import copy

import pytest
import torch
from torch import nn

from loca_vision import LoCAConfig, adapters, inject, remove, set_adapters
from support import pipelines as tiny
from support.attention import (
    CONFIG,
    FAMILIES,
    LAYERS,
    adapted,
    assert_gradients_near,
    assert_near,
    attention_layers,
    base_output,
    call,
    every_family,
    expected,
    gradients,
    layer_path,
    loss_of,
    output,
    reference_gradients,
    shown,
    written,
)
from support.timm_models import randomise


@every_family
def test_injecting_changes_nothing_at_first(family):
    model = FAMILIES[family]()
    keys, before = list(model.state_dict()), output(model)
    inject(model, CONFIG)
    assert torch.equal(output(model), before)
    assert [key for key in model.state_dict() if ".loca." not in key] == keys


NAMES = {
    "flux": [f"transformer_blocks.0.attn.{part}" for part in LAYERS["diffusers"]]
    + [f"single_transformer_blocks.0.attn.{part}" for part in "qkv"],
    "sd3": [f"transformer_blocks.0.attn.{part}" for part in LAYERS["diffusers"]]
    + [f"transformer_blocks.1.attn.{part}" for part in LAYERS["diffusers"] if part != "add_out"],
    "clip": [f"encoder.layers.{block}.self_attn.{part}" for block in (0, 1) for part in LAYERS["clip"]],
    "t5": [f"encoder.block.{block}.layer.0.SelfAttention.{part}" for block in (0, 1) for part in LAYERS["t5"]],
    "vae": [f"{side}.mid_block.attentions.0.{part}" for side in ("encoder", "decoder") for part in ("q", "k", "v", "out")],
}


@pytest.mark.parametrize("family", NAMES)
def test_names_are_those_of_the_projections(family):
    model = FAMILIES[family]()
    names = inject(model, CONFIG)
    found = [name.removeprefix("text_model.") for name in names]
    assert sorted(found) == sorted(NAMES[family])
    assert tuple(adapters(model)) == names


def test_a_unet_has_all_its_attention_adapted():
    model = tiny.unet()
    names = inject(model, CONFIG)
    assert len(names) == 4 * len(attention_layers(model)) == 4 * len(model.attn_processors)
    assert inject(tiny.unet(), LoCAConfig(n_components=5, targets=("v",))) == tuple(n for n in names if n.endswith(".v"))


@every_family
def test_the_output_is_that_of_the_written_weights(family):
    model = adapted(family)
    assert (expected(family) - base_output(family)).abs().max() > 1e-2 * base_output(family).abs().max()
    assert_near(output(model), expected(family))
    set_adapters(model, "default", -0.5)
    assert_near(output(model), expected(family, -0.5))
    set_adapters(model, [])
    assert torch.equal(output(model), base_output(family))


@every_family
def test_every_projection_alone(family):
    """So that a small one is not lost beside the others."""
    parts = dict.fromkeys(name.rpartition(".")[2] for name in adapters(adapted(family)))
    for part in parts:
        model = adapted(family)
        for projection, spectrum in adapters(model).items():
            spectrum.coefficients.data.mul_(5.0 if projection.endswith(f".{part}") else 0.0)
        alone = output(written(FAMILIES[family](), adapters(model), family))
        effect = (alone - base_output(family)).abs().max()
        assert effect > 1e-4, part
        assert (output(model) - alone).abs().max() < 0.02 * effect, part


@every_family
def test_gradients_are_those_of_the_written_weights(family):
    assert_gradients_near(gradients(adapted(family, learned=True)), reference_gradients(family))


def test_a_base_trained_together_with_the_adapter_gets_its_gradient():
    model, base = adapted(learned=True), written(tiny.unet(), adapters(adapted()))
    base.requires_grad_(True)
    paths = [layer_path(projection) for projection in adapters(model)]
    for path in paths:
        model.get_submodule(path).weight.requires_grad_(True)
    got = gradients(model)
    loss_of(call(base)).backward()
    assert_gradients_near(got, reference_gradients("unet"))
    assert_gradients_near(
        [model.get_submodule(path).weight.grad for path in paths], [base.get_submodule(path).weight.grad for path in paths]
    )


def test_adapters_add_up():
    model = adapted()
    inject(model, LoCAConfig(n_components=20, targets=("k", "v"), seed=1), "second")
    randomise(model, "second", 0.2)
    set_adapters(model, ["default", "second"], [0.5, 2.0])
    twin = written(written(tiny.unet(), adapters(model), strength=0.5), adapters(model, "second"), strength=2.0)
    assert_near(output(model), output(twin))
    remove(model, "default")
    assert_near(output(model), output(written(tiny.unet(), adapters(model, "second"), strength=2.0)))
    remove(model, "second")
    assert torch.equal(output(model), base_output("unet"))


def test_a_layer_put_in_the_place_of_another_is_adapted():
    model, base = adapted(), tiny.unet()
    torch.manual_seed(5)
    other = nn.Linear(16, 16, bias=False)
    for one in (model, base):
        attention = one.down_blocks[0].attentions[0].transformer_blocks[0].attn1
        attention.to_q = copy.deepcopy(other)
    assert_near(output(model), output(written(base, adapters(model))))


def test_what_others_hang_on_a_linear_layer_runs():
    model, seen, hung = adapted(), [], []
    for layer in attention_layers(model):
        layer.to_k.register_forward_hook(lambda module, given, answer: seen.append(module))
        layer.to_out[0].register_forward_pre_hook(lambda module, given: seen.append(module))
        run = layer.to_v.forward
        layer.to_v.forward = lambda x, run=run, module=layer.to_v: seen.append(module) or run(x)
        hung += [layer.to_k, layer.to_out[0], layer.to_v]
    assert_near(output(model), expected())
    assert {id(module) for module in seen} == {id(module) for module in hung}
    assert_gradients_near(gradients(shown(model, learned=True)), reference_gradients("unet"))
