"""Adapted attention layers of diffusers and transformers: gradient checkpointing."""

import pytest
import torch

from support.attention import KEYWORD, adapted, assert_gradients_near, gradients, reference_gradients


@pytest.mark.parametrize("scale", (None, 0.3))
@pytest.mark.parametrize("family", KEYWORD)
def test_gradient_checkpointing(family, scale):
    more = {} if scale is None else {KEYWORD[family]: {"scale": scale}}
    exact = gradients(adapted(family, learned=True).train(), **more)
    model = adapted(family, learned=True).train()
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model, **more)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(checkpointed, exact, strict=True))
    assert_gradients_near(checkpointed, reference_gradients(family, scale or 1.0))


@pytest.mark.parametrize("family", ("clip", "t5"))
def test_gradient_checkpointing_of_a_text_encoder(family):
    model = adapted(family, learned=True).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_gradients_near(gradients(model), reference_gradients(family))
