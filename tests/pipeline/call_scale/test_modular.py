"""Modular pipelines have the methods, and their text encoders hear the scale of a call."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import loca_vision.diffusers as loca
from loca_vision.pipeline.loader import METHODS, PROPERTIES
from support.pipelines import quiet, stable_diffusion_xl
from support.reference_weights import adapter, assert_far, assert_near, merged

pytestmark = pytest.mark.skipif(not hasattr(diffusers, "ModularPipeline"), reason="this diffusers has no modular pipelines")


def modular(pipe: Any) -> Any:
    from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

    made = quiet(StableDiffusionXLAutoBlocks().init_pipeline())
    names = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    made.update_components(**{name: getattr(pipe, name) for name in names})
    return made


def shown(pipe: Any, **more: Any) -> Tensor:
    given = {"prompt": "a cat", "height": 16, "width": 16, "num_inference_steps": 2, "output_type": "pt"}
    return torch.as_tensor(pipe(**given, output="images", generator=torch.Generator().manual_seed(5), **more))


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    yield
    diffusers.logging.enable_progress_bar()
    diffusers.logging.set_verbosity(before)


@pytest.mark.parametrize("component", ["unet", "text_encoder", "text_encoder_2"])
def test_every_component_hears_the_scale(component: str) -> None:
    made = adapter(stable_diffusion_xl(), {component: ("q", "k", "v", "out")}, size=0.7)
    pipe = modular(stable_diffusion_xl())
    pipe.load_loca_weights(made.state())

    def wanted(scale: float) -> Tensor:
        return shown(modular(merged((made, scale), make=stable_diffusion_xl)))

    assert_far(wanted(0.5), wanted(1.0))
    assert_near(shown(pipe, cross_attention_kwargs={"scale": 0.5}), wanted(0.5))
    assert_near(shown(pipe), wanted(1.0))


def test_it_has_the_methods(tmp_path: Path) -> None:
    made = adapter(stable_diffusion_xl(), {"unet": ("q",), "text_encoder_2": ("v",)})
    pipe = modular(stable_diffusion_xl())
    base = shown(pipe)
    pipe.load_loca_weights(made.state(), "a")
    full = shown(pipe)
    pipe.save_loca_weights(tmp_path)
    pipe.fuse_loca(safe_fusing=True)
    assert pipe.fused_locas == {"a"}
    assert_near(shown(pipe), full)
    pipe.unfuse_loca()
    pipe.set_loca_adapters("a", 0.5)
    assert_near(shown(pipe), shown(modular(merged((made, 0.5), make=stable_diffusion_xl))))
    pipe.unload_loca_weights()
    assert torch.equal(shown(pipe), base)
    pipe.load_loca_weights(tmp_path)
    assert torch.equal(shown(pipe), full)


def test_unregister_takes_them_away() -> None:
    try:
        loca.unregister()
        assert not any(hasattr(diffusers.ModularPipeline, name) for name in (*METHODS, *PROPERTIES))
    finally:
        loca.register()
    assert all(hasattr(diffusers.ModularPipeline, name) for name in (*METHODS, *PROPERTIES))
