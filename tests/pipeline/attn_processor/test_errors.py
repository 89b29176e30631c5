"""LoCAAttnProcessor: errors."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

import loca_vision.diffusers
from loca_vision import LoCAConfig
from loca_vision.diffusers import LoCAAttnProcessor
from loca_vision.methods.spectrum import random_spectrum
from support.pipelines import output_of, unet
from support.processors import ATTENTION


def test_what_is_no_processor_or_spectrum_is_refused() -> None:
    spectrum = random_spectrum((32, 32), 4, name="q", seed=0)
    with pytest.raises(TypeError, match="processor is a str: an attention processor is called"):
        LoCAAttnProcessor("AttnProcessor", {"q": spectrum})
    with pytest.raises(TypeError, match=r"spectra\['q'\] is a Tensor: expected a Spectrum or another update"):
        LoCAAttnProcessor(AttnProcessor(), {"q": torch.ones(3)})
    with pytest.raises(ValueError, match="name at least one projection"):
        LoCAAttnProcessor(AttnProcessor(), {})
    for part in ("to_q", "qkv", "fc1", "", 3):
        with pytest.raises(ValueError, match=r"spectra: .* is not one of q, k, v, out, add_q, add_k, add_v, add_out"):
            LoCAAttnProcessor(AttnProcessor(), {part: spectrum})  # type: ignore[dict-item]


def test_what_does_not_fit_the_layer_is_refused() -> None:
    attention = unet().get_submodule(ATTENTION)
    before = attention.processor
    with pytest.raises(ValueError, match=r"n_components=.*: expected one number for one layer"):
        LoCAAttnProcessor.of(attention, LoCAConfig(n_components={"*": 3}))
    with pytest.raises(ValueError, match="n_components=769: k has 32 x 24 = 768 cells"):
        LoCAAttnProcessor.of(attention, LoCAConfig(n_components=32 * 24 + 1, targets=("k",)))
    with pytest.raises(ValueError, match=r"targets=\('fc1',\): Attention has no such projection"):
        LoCAAttnProcessor.of(attention, LoCAConfig(n_components=3, targets=("fc1",)))
    with pytest.raises(ValueError, match="Linear has no such projection"):
        LoCAAttnProcessor.of(nn.Linear(3, 3), LoCAConfig(n_components=3))
    assert attention.processor is before


def test_a_spectrum_of_another_shape_is_an_error_and_not_another_picture() -> None:
    model = unet()
    attention = model.get_submodule(ATTENTION)
    spectrum = random_spectrum((32, 32), 4, name="k", seed=0)  # this layer's k is (32, 24)
    with torch.no_grad():
        spectrum.coefficients.fill_(1.0)
    attention.set_processor(LoCAAttnProcessor(attention.processor, {"k": spectrum}))
    with pytest.raises((ValueError, RuntimeError)):
        output_of(model)


def test_it_is_what_the_module_exports() -> None:
    assert loca_vision.diffusers.LoCAAttnProcessor is LoCAAttnProcessor
    assert "LoCAAttnProcessor" in loca_vision.diffusers.__all__
