"""Adapted attention layers of diffusers and transformers: quantised layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loca_vision import adapters, inject, remove
from support import pipelines as tiny
from support.attention import CONFIG, adapted, anatomy, arrivals, assert_near, layer_path, output, shown

quantised = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning", "ignore:torch.quantize_per_tensor:UserWarning"
)


def eight_bits(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@quantised
@arrivals
def test_quantised_layers(arrival):
    """The update comes beside what the quantised layer answers."""
    base, deltas = eight_bits(tiny.unet()), adapters(adapted())
    bare = output(base)
    if arrival == "before":
        model = eight_bits(tiny.unet())
        inject(model, CONFIG)
        shown(model)
    else:
        model = eight_bits(adapted())
    for projection, spectrum in deltas.items():
        layer, delta = base.get_submodule(layer_path(projection)), spectrum.delta().detach()
        assert not isinstance(layer, nn.Linear) or not layer._parameters
        layer.register_forward_hook(lambda module, given, answer, delta=delta: answer + F.linear(given[0], delta))
    wanted = output(base)
    assert (wanted - bare).abs().max() > 1e-2
    assert_near(output(model), wanted, 1e-4)
    assert_near(output(model, cross_attention_kwargs={"scale": 0}), bare, 1e-7)
    remove(model)
    assert torch.equal(output(model), bare)


@quantised
def test_merging_into_quantised_weights_is_refused():
    model = eight_bits(adapted())
    answer, before = output(model), anatomy(model)
    with pytest.raises(ValueError, match=r"attn1\.to_q is a Linear without a plain floating-point weight"):
        remove(model, merge=True)
    assert anatomy(model) == before
    assert torch.equal(output(model), answer)
