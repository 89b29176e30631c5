"""LoCAAttnProcessor: together with other adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from loca_vision import LoCAConfig, adapters, inject, remove
from loca_vision.diffusers import LoCAAttnProcessor
from support.pipelines import output_of, picture, stable_diffusion, unet
from support.processors import scatter, with_updates, wrap
from support.reference_weights import adapter, assert_near, layers, write_updates


@pytest.mark.parametrize("first", ["inject", "processor"])
def test_it_adds_to_what_is_injected(first: str) -> None:
    model = unet()
    made: dict[str, Any] = {}
    for step in (first, {"inject": "processor", "processor": "inject"}[first]):
        if step == "processor":
            made = wrap(model)
        else:
            inject(model, LoCAConfig(n_components=9, scale=1.5, targets=("q", "v")))
    scatter(made)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for spectrum in adapters(model).values():
            spectrum.coefficients.copy_(torch.randn(spectrum.coefficients.shape, generator=generator))
    oracle = with_updates(unet(), made)
    with torch.no_grad():
        genuine = dict(layers(oracle))
        for name, spectrum in adapters(model).items():
            genuine[name].weight += spectrum.delta()
    assert_near(output_of(model), output_of(oracle))
    remove(model)
    assert_near(output_of(model), output_of(with_updates(unet(), made)))


def test_it_adds_to_what_a_pipeline_has_loaded() -> None:
    pipe, plain = stable_diffusion(), stable_diffusion()
    loaded = adapter(stable_diffusion(), {"unet": ("q", "out")}, seed=4)
    pipe.load_loca_weights(loaded.state())
    made = wrap(pipe.unet)
    scatter(made)
    write_updates(with_updates(plain.unet, made), "unet", (loaded, 1.0))
    assert_near(picture(pipe), picture(plain))
    half = stable_diffusion()
    write_updates(with_updates(half.unet, made), "unet", (loaded, 0.5))
    assert_near(picture(pipe, cross_attention_kwargs={"scale": 0.5}), picture(half))
    pipe.unload_loca_weights()
    alone = stable_diffusion()
    with_updates(alone.unet, made)
    assert_near(picture(pipe), picture(alone))


def test_one_around_another_adds_up() -> None:
    model = unet()
    inner = wrap(model)
    scatter(inner)
    outer = wrap(model, LoCAConfig(n_components=20, targets=("q", "v"), seed=7))
    scatter(outer, 2.0)
    assert all(isinstance(each.processor, LoCAAttnProcessor) for each in outer.values())
    assert_near(output_of(model), output_of(with_updates(with_updates(unet(), inner), outer)))
