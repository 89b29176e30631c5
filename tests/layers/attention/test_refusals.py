"""Adapted attention layers of diffusers and transformers: refusals."""

import pytest
import torch

from loca_vision import LoCAConfig, inject
from support import pipelines as tiny
from support.attention import CONFIG, adapted, anatomy, output

BAD = {
    "no such targets": (
        LoCAConfig(n_components=5, targets=("q", "fc1"), layers="*attn1"),
        "new",
        r"has no 'fc1' projection in the layers that layers=\('\*attn1',\) chooses",
    ),
    "no such layers": (LoCAConfig(n_components=5, layers="*atn1"), "new", r"the pattern '\*atn1' fits no .*perhaps attn1"),
    "a name in use": (CONFIG, "default", "has an adapter of that name"),
    "too many components": (LoCAConfig(n_components=257, targets=("q",)), "new", "n_components=257: .* 16 x 16 = 256 cells"),
}


@pytest.mark.parametrize(("config", "name", "sentence"), BAD.values(), ids=BAD)
def test_what_is_refused_leaves_the_model_as_it_was(config, name, sentence):
    model = adapted()
    answer, before = output(model), anatomy(model)
    with pytest.raises(ValueError, match=sentence):
        inject(model, config, name)
    assert anatomy(model) == before
    assert torch.equal(output(model), answer)
    fresh = tiny.unet()
    if name == "new":
        before = anatomy(fresh)
        with pytest.raises(ValueError, match=sentence):
            inject(fresh, config)
        assert anatomy(fresh) == before
