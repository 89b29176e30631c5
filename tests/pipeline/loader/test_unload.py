"""LoCA methods of a pipeline: unloading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loca_vision import adapters
from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    Made,
    assert_near,
    assert_same,
    expected,
    facts,
    merged,
)


def test_unloading_restores_every_bit(pipe: Any, first: Made, second: Made) -> None:
    before = facts(pipe)
    for made in (first, second):
        pipe.load_loca_weights(made.state())
    pipe.set_loca_adapters(["default_0", "default_1"], [0.3, {"unet": {"down": 2.0}}])
    picture(pipe)
    pipe.unload_loca_weights()
    assert_same(pipe, before)
    pipe.unload_loca_weights()
    pipe.load_loca_weights(first.state())
    assert pipe.get_active_loca_adapters() == ["default_0"]
    assert_near(picture(pipe), expected((first, 1.0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_restored_too_and_spectra_stay_exact(dtype: torch.dtype, first: Made) -> None:
    pipe = stable_diffusion().to(dtype)
    before = facts(pipe)
    pipe.load_loca_weights(first.state())
    full = stable_diffusion()
    full.load_loca_weights(first.state())
    full.to(dtype)
    assert torch.equal(picture(full), picture(pipe))
    for model in (pipe.unet, full.unet):
        spectrum = next(iter(adapters(model, "default_0").values()))
        assert spectrum.coefficients.dtype == spectrum.locations.dtype == torch.float32
    made = merged((first, 1.0), make=lambda: stable_diffusion().to(dtype))
    assert_near(output_of_half(pipe, dtype), output_of_half(made, dtype), tolerance=0.05)
    pipe.unload_loca_weights()
    assert_same(pipe, before)


@torch.no_grad()
def output_of_half(pipe: Any, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    sample, text = (torch.randn(size, generator=generator).to(dtype) for size in ((2, 4, 8, 8), (2, 6, 24)))
    result: Tensor = pipe.unet(sample, torch.tensor(3), text, return_dict=False)[0]
    return result.float()
