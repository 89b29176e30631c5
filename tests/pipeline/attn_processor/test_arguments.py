"""LoCAAttnProcessor: arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor

from loca_vision.diffusers import LoCAAttnProcessor
from support.pipelines import output_of, unet
from support.processors import ATTENTION, CONFIG, Biased, scatter, with_updates, wrap
from support.reference_weights import assert_far, assert_near


def test_arguments_reach_the_inner_processor() -> None:
    model, plain = unet(), unet()
    inner = Biased()
    plain.set_attn_processor(Biased())
    made = wrap(model, processor=lambda: inner)
    given = {"strength": 0.25, "mask": object()}
    found = output_of(model, cross_attention_kwargs=dict(given))
    assert len(inner.heard) == len(made) and all(heard == given for heard in inner.heard)
    assert torch.equal(found, output_of(plain, cross_attention_kwargs=dict(given)))
    assert_far(found, output_of(model))


def test_arguments_it_does_not_know_are_dropped_as_for_the_inner_one(caplog: pytest.LogCaptureFixture) -> None:
    """diffusers warns of them and leaves them out; wrapping makes no difference."""
    import diffusers

    diffusers.logging.enable_propagation()
    try:
        messages = []
        for model in (unet(), unet()):
            inner = Biased()
            model.set_attn_processor(inner)
            if messages:
                wrap(model)
            caplog.clear()
            output_of(model, cross_attention_kwargs={"strength": 0.5, "unheard_of": 1})
            assert inner.heard[0]["strength"] == 0.5
            messages.append([record.getMessage().split(" Biased")[0].split(" LoCA")[0] for record in caplog.records])
    finally:
        diffusers.logging.disable_propagation()
    assert messages[0] and messages[0] == messages[1]
    assert all("unheard_of" in message for message in messages[1])


def test_the_processor_alone_can_be_called() -> None:
    attention = unet().get_submodule(ATTENTION)
    processor = LoCAAttnProcessor.of(attention, CONFIG, Biased(0.0))
    scatter({ATTENTION: processor})
    states, text = torch.randn(2, 9, 32), torch.randn(2, 6, 24)
    attention.set_processor(processor)
    with torch.no_grad():
        by_layer = attention(states, encoder_hidden_states=text, strength=2.0)
        by_itself = processor(attention, states, text, strength=2.0)
    assert torch.equal(by_layer, by_itself)


class Writing(AttnProcessor2_0):
    """Keeps something on the layer it is called with, as some do."""

    def __call__(self, attn: Any, *args: Any, **named: Any) -> Any:
        attn.calls = getattr(attn, "calls", 0) + 1
        assert isinstance(attn.to_q.weight, Tensor) and attn.heads and attn.to_out[1] is not None
        assert attn.to_q.in_features and attn.to_out[0].out_features
        return super().__call__(attn, *args, **named)


def test_what_the_processor_sees_is_the_layer_in_all_else() -> None:
    model = unet()
    made = wrap(model, processor=Writing)
    output_of(model)
    assert all(model.get_submodule(path).calls == 1 for path in made)


def test_a_processor_that_reads_weights_reads_adapted_ones() -> None:
    seen: dict[str, Tensor] = {}

    class Reading(AttnProcessor2_0):
        def __call__(self, attn: Any, *args: Any, **named: Any) -> Any:
            seen["q"], seen["out"] = attn.to_q.weight.clone(), attn.to_out[0].weight.clone()
            return super().__call__(attn, *args, **named)

    model = unet()
    attention = model.get_submodule(ATTENTION)
    attention.set_processor(LoCAAttnProcessor.of(attention, CONFIG, Reading()))
    made = {ATTENTION: attention.processor}
    scatter(made)
    output_of(model)
    wanted: Any = with_updates(unet(), made).get_submodule(ATTENTION)
    assert_near(seen["q"], wanted.to_q.weight.detach())
    assert_near(seen["out"], wanted.to_out[0].weight.detach())
    assert torch.equal(attention.to_q.weight, unet().get_submodule(ATTENTION).to_q.weight)
