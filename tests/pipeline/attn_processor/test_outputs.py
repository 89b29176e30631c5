"""LoCAAttnProcessor: outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0

from loca_vision import LoCAConfig, adapters, inject
from loca_vision.diffusers import LoCAAttnProcessor
from loca_vision.methods.spectrum import Spectrum
from support.pipelines import flux, output_of, picture, pixart, sd3, stable_diffusion, unet, xl_unet
from support.processors import ATTENTION, CONFIG, Biased, scatter, with_updates, wrap
from support.reference_weights import assert_far, assert_near


@pytest.mark.parametrize("processor", [AttnProcessor, AttnProcessor2_0, Biased])
def test_any_processor_may_be_wrapped(processor: Callable[[], Any]) -> None:
    model, plain = unet(), unet()
    plain.set_attn_processor(processor())
    base = output_of(plain)
    made = wrap(model, processor=processor)
    assert torch.equal(output_of(model), base), "zero coefficients change nothing"
    scatter(made)
    assert_far(output_of(model), base)
    assert_near(output_of(model), output_of(with_updates(plain, made)))


@pytest.mark.parametrize("after", [False, True], ids=["wrapped when stacked", "stacked when wrapped"])
def test_stacked_projections_are_adapted_too(after: bool) -> None:
    model, plain = unet(), unet()
    if after:
        made = wrap(model, processor=FusedAttnProcessor2_0)
        for module in model.modules():
            if hasattr(module, "fuse_projections"):
                module.fuse_projections(fuse=True)
    else:
        model.fuse_qkv_projections()
        made = wrap(model)
        assert all(isinstance(each.processor, FusedAttnProcessor2_0) for each in made.values())
    assert_near(output_of(model), output_of(plain))
    scatter(made)
    assert_far(output_of(model), output_of(plain))
    assert_near(output_of(model), output_of(with_updates(plain, made)))


@pytest.mark.parametrize("targets", [("q",), ("v", "k"), ("out",)])
def test_only_the_targets_are_adapted(targets: tuple[str, ...]) -> None:
    model = unet()
    made = wrap(model, LoCAConfig(n_components=5, scale=-3.0, targets=targets))
    assert all(set(each.spectra) == set(targets) for each in made.values())
    scatter(made)
    assert_near(output_of(model), output_of(with_updates(unet(), made)))


def test_one_layer_alone() -> None:
    model = unet()
    attention = model.get_submodule(ATTENTION)
    attention.set_processor(LoCAAttnProcessor.of(attention, CONFIG))
    made = {ATTENTION: attention.processor}
    scatter(made)
    assert_far(output_of(model), output_of(unet()))
    assert_near(output_of(model), output_of(with_updates(unet(), made)))


def test_spectra_of_ones_own() -> None:
    model = unet()
    attention = model.get_submodule(ATTENTION)
    spectrum = Spectrum((32, 24), torch.tensor([3.0, -2.0]), torch.tensor([[0.0, 0.0], [1.0, 1.0]]), scale=0.5)
    processor = LoCAAttnProcessor(attention.processor, {"k": spectrum})
    attention.set_processor(processor)
    assert processor.spectra == {"k": spectrum}
    assert_near(output_of(model), output_of(with_updates(unet(), {ATTENTION: processor})))


def test_the_scale_multiplies_the_updates() -> None:
    model = unet()
    made = wrap(model)
    scatter(made)
    for scale in (0.5, -1.0, 0.0, 1.0):
        for processor in made.values():
            processor.scale = scale
        assert_near(output_of(model), output_of(with_updates(unet(), made, scale)))
    quarter = LoCAAttnProcessor(AttnProcessor2_0(), made[ATTENTION].spectra, 0.25)
    assert quarter.scale == 0.25


def test_another_model_of_larger_blocks() -> None:
    model = xl_unet()
    made = wrap(model)
    scatter(made, 0.5)
    assert_far(output_of(model), output_of(xl_unet()))
    assert_near(output_of(model), output_of(with_updates(xl_unet(), made)))


@pytest.mark.parametrize("build", [sd3, flux, pixart])
def test_the_processors_of_transformers_may_be_wrapped(build: Callable[[], Any]) -> None:
    """Those of joint attention have projections of the text besides; `inject` is the oracle."""
    model, injected = build(), build()
    base = output_of(model)
    made = wrap(model)
    assert torch.equal(output_of(model), base)
    assert ("add_q" in {part for each in made.values() for part in each.spectra}) is (build is not pixart)
    scatter(made)
    inject(injected, CONFIG)
    for name, spectrum in adapters(injected).items():
        path, _, part = name.rpartition(".")
        spectrum.load_state_dict(made[path].spectra[part].state_dict())
    assert_far(output_of(model), base)
    assert_near(output_of(model), output_of(injected))


def test_a_whole_pipeline() -> None:
    pipe, plain = stable_diffusion(), stable_diffusion()
    base = picture(plain)
    made = wrap(pipe.unet)
    assert torch.equal(picture(pipe), base)
    scatter(made)
    with_updates(plain.unet, made)
    assert_near(picture(pipe), picture(plain))
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(picture(pipe), base)


def test_half_precision_keeps_spectra_exact() -> None:
    model = unet().to(torch.bfloat16)
    made = wrap(model)
    scatter(made)
    full = {name: p.clone() for name, p in model.named_parameters() if "processor" in name}
    model.to(torch.float16).to(torch.bfloat16)
    after = dict(model.named_parameters())
    assert full and all(after[name].dtype == torch.float32 and torch.equal(after[name], p) for name, p in full.items())
