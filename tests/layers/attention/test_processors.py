"""Adapted attention layers of diffusers and transformers: attention processors."""

import pytest
import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import nn
from torch.nn import functional as F

from loca_vision import adapters, inject, remove
from support import pipelines as tiny
from support.attention import (
    CONFIG,
    adapted,
    arrivals,
    assert_gradients_near,
    assert_near,
    attention_layers,
    expected,
    gradients,
    output,
    reference_gradients,
    shown,
    written,
)

PROCESSORS = {
    "AttnProcessor": lambda m: m.set_attn_processor(AttnProcessor()),
    "AttnProcessor2_0": lambda m: m.set_attn_processor(AttnProcessor2_0()),
    "SlicedAttnProcessor": lambda m: m.set_attn_processor(SlicedAttnProcessor(1)),
    "default": lambda m: m.set_default_attn_processor(),
    "slicing": lambda m: m.set_attention_slice("max"),
    "by name": lambda m: m.set_attn_processor({name: AttnProcessor() for name in m.attn_processors}),
}


@pytest.mark.parametrize("choose", PROCESSORS.values(), ids=PROCESSORS)
@arrivals
def test_any_processor_sees_adapted_projections(choose, arrival):
    model = tiny.unet()
    names = list(model.attn_processors)
    if arrival == "before":
        choose(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        choose(model)
    assert list(model.attn_processors) == names
    chosen = tiny.unet()
    choose(chosen)
    assert [type(p) for p in model.attn_processors.values()] == [type(p) for p in chosen.attn_processors.values()]
    assert_near(output(model), expected())
    remove(model)
    assert torch.equal(output(model), output(chosen))


def test_processors_of_joint_attention():
    model = adapted("sd3")
    model.set_attn_processor(JointAttnProcessor2_0())
    assert_near(output(model), expected("sd3"))


def ip_adapter(model):
    """An IP-Adapter of random weights, by the way diffusers loads one."""
    torch.manual_seed(6)
    layers = {}
    for name, module in model.named_modules():
        if name.endswith("attn2"):
            for part in ("k", "v"):
                layers[name, part] = torch.randn(module.to_k.out_features, 24) / 5
    cross = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    weights = {
        f"{2 * i + 1}.to_{part}_ip.weight": layers[name.removesuffix(".processor"), part]
        for i, name in enumerate(cross)
        for part in ("k", "v")
    }
    image = {"proj.weight": torch.randn(4 * 24, 10), "proj.bias": torch.randn(4 * 24)}
    image |= {"norm.weight": torch.ones(24), "norm.bias": torch.zeros(24)}
    model._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": weights}])
    return model


@arrivals
def test_together_with_an_ip_adapter(arrival):
    pictures = {"added_cond_kwargs": {"image_embeds": [torch.randn(2, 1, 10)]}}
    model = tiny.unet()
    if arrival == "before":
        ip_adapter(model)
    inject(model, CONFIG)
    shown(model)
    if arrival == "after":
        ip_adapter(model)
    oracle, base = ip_adapter(written(tiny.unet(), adapters(model))), ip_adapter(tiny.unet())
    wanted = output(oracle, **pictures)
    assert (wanted - expected()).abs().max() > 1e-2
    assert_near(output(model, **pictures), wanted)
    remove(model)
    assert torch.equal(output(model, **pictures), output(base, **pictures))


class Curious:
    """A processor that reads weights, keeps notes on the layer and asks what it is."""

    def __init__(self):
        self.layers, self.kinds, self.fused = [], [], []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, mark=None):
        self.kinds.append((isinstance(attn, Attention), attn.__class__.__name__, len(attn.to_out)))
        self.fused.append(any(hasattr(attn, name) for name in ("to_qkv", "to_kv", "to_added_qkv")))
        attn.calls = getattr(attn, "calls", 0) + 1
        attn.mark = mark
        attn.last = nn.Identity()
        self.layers.append(attn.to_q.in_features)
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = F.linear(hidden_states, attn.to_q.weight, attn.to_q.bias)
        key, value = attn.to_k(text), F.linear(text, attn.to_v.weight)
        query, key, value = (attn.head_to_batch_dim(one) for one in (query, key, value))
        scores = attn.get_attention_scores(query, key, attention_mask)
        answer = attn.batch_to_head_dim(torch.bmm(scores, value))
        answer = F.linear(answer, attn.to_out[0].weight, attn.to_out[0].bias)
        return attn.to_out[1](answer)


def test_a_processor_that_reads_weights():
    model = adapted()
    processor = Curious()
    model.set_attn_processor(processor)
    assert_near(output(model), expected())
    count = len(attention_layers(model))
    assert processor.kinds == [(True, "Attention", 2)] * count
    assert processor.fused == [False] * count
    assert set(processor.layers) == {16, 32}
    assert_gradients_near(gradients(shown(model, learned=True)), reference_gradients("unet"))


def test_what_a_processor_sets_is_set_on_the_layer():
    model = adapted()
    model.set_attn_processor(Curious())
    output(model, cross_attention_kwargs={"mark": 5})
    output(model, cross_attention_kwargs={"mark": 6, "scale": 0.5})
    for removed in (False, True):
        if removed:
            remove(model)
        for layer in attention_layers(model):
            assert layer.__dict__["calls"] == 2 and layer.__dict__["mark"] == 6
            assert isinstance(layer._modules["last"], nn.Identity)


def test_a_fused_layer_shows_that_it_is():
    model = adapted()
    model.fuse_qkv_projections()
    processor = Curious()
    model.set_attn_processor(processor)
    assert_near(output(model), expected())
    assert all(processor.fused)
