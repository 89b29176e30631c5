"""diffusers' ways of copying a model's weights into another: with adapters, a sentence says what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    DDIMScheduler,
    FluxControlNetModel,
    MotionAdapter,
    SD3ControlNetModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from diffusers.models import SparseControlNetModel

import loca_vision.diffusers as loca
from loca_vision import LoCAConfig, inject, remove
from support import pipelines as tiny
from support.formulas import stir

CONFIG = LoCAConfig(n_components=5, scale=3.0)
SENTENCE = r"copies the weights of \w+ without its adapters \(default\): take them out first \(unload_loca_weights"


def motion_adapter() -> Any:
    torch.manual_seed(3)
    return MotionAdapter(block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2,
                         motion_norm_num_groups=8, motion_max_seq_length=8)  # fmt: skip


COPIES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "ControlNetModel": (tiny.unet, lambda model: ControlNetModel.from_unet(model)),
    "ControlNetUnionModel": (tiny.unet, lambda model: ControlNetUnionModel.from_unet(model)),
    "SparseControlNetModel": (tiny.unet, lambda model: SparseControlNetModel.from_unet(model)),
    "UNetControlNetXSModel": (tiny.unet, lambda model: UNetControlNetXSModel.from_unet(model, size_ratio=0.5)),
    "UNetMotionModel": (tiny.unet, lambda model: UNetMotionModel.from_unet2d(model)),
    "SD3ControlNetModel": (tiny.sd3, lambda model: SD3ControlNetModel.from_transformer(model)),
    "FluxControlNetModel": (tiny.flux, lambda model: FluxControlNetModel.from_transformer(model)),
}


def adapted(model: Any) -> Any:
    inject(model, CONFIG)
    return model


def animated() -> Any:
    pipe = tiny.stable_diffusion()
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="linear", steps_offset=1)
    motion = motion_adapter()
    unet = UNetMotionModel.from_unet2d(pipe.unet, motion)
    return tiny.quiet(
        AnimateDiffPipeline(
            vae=pipe.vae,
            text_encoder=pipe.text_encoder,
            tokenizer=pipe.tokenizer,
            unet=unet,
            motion_adapter=motion,
            scheduler=scheduler,
        )
    )


@pytest.mark.parametrize("name", COPIES)
def test_constructors(name: str) -> None:
    make, copied = COPIES[name]
    model = adapted(make())
    for given in (model, torch.compile(model, backend="eager")):
        with pytest.raises(ValueError, match=rf"^{name}\.from_\w+ {SENTENCE}"):
            copied(given)


@pytest.mark.parametrize("name", ["ControlNetModel", "UNetMotionModel"])
def test_with_the_adapter_in_the_weights_they_copy_it(name: str) -> None:
    make, copied = COPIES[name]
    model = stir(adapted(make()), "default")
    remove(model, merge=True)
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = [layers.get_submodule(path).weight for layers in (copied(model), model, make())]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_what_copies_no_weights_takes_an_adapted_model() -> None:
    model = adapted(tiny.unet())
    ControlNetModel.from_unet(model, load_weights_from_unet=False)
    ControlNetXSAdapter.from_unet(model, size_ratio=0.5)


def test_a_class_made_later_and_after_unregister() -> None:
    model = adapted(tiny.unet())

    class Later(ControlNetModel):  # type: ignore[misc]
        @classmethod
        def from_unet(cls, *inputs: Any, **named: Any) -> Any:
            return "its own"

    with pytest.raises(ValueError, match=SENTENCE):
        Later.from_unet(model)
    try:
        loca.unregister()
        assert Later.from_unet(model) == "its own"
        assert not hasattr(ControlNetModel.from_unet, "__wrapped__")
    finally:
        loca.register()


def test_a_motion_pipeline_from_an_adapted_one() -> None:
    pipe = tiny.stable_diffusion()
    adapted(pipe.unet)
    with pytest.raises(ValueError, match=rf"UNetMotionModel\.from_unet2d {SENTENCE}"):
        AnimateDiffPipeline.from_pipe(pipe, motion_adapter=motion_adapter())
    pipe.unload_loca_weights()
    AnimateDiffPipeline.from_pipe(pipe, motion_adapter=motion_adapter())


def frames(pipe: Any) -> torch.Tensor:
    given = {"num_inference_steps": 1, "output_type": "pt", "height": 16, "width": 16, "num_frames": 4}
    return torch.as_tensor(pipe("a cat", generator=torch.Generator().manual_seed(5), **given).frames)


def test_free_noise_replaces_no_adapted_block(tmp_path: Path) -> None:
    pipe = animated()
    inject(pipe.unet, replace(CONFIG, layers="*motion_modules*"))
    stir(pipe.unet, "default")
    before = frames(pipe)
    sentence = r"enable_free_noise replaces down_blocks\.0\.motion_modules\.0.*has an adapter: unload it first"
    with pytest.raises(ValueError, match=sentence):
        pipe.enable_free_noise(context_length=4, context_stride=2)
    assert torch.equal(frames(pipe), before)
    pipe.save_loca_weights(tmp_path)
    pipe.unload_loca_weights()
    pipe.enable_free_noise(context_length=4, context_stride=2)
    base = frames(pipe)
    pipe.load_loca_weights(tmp_path)
    assert (frames(pipe) - base).abs().max() > 1e-3
    pipe.enable_free_noise(context_length=4, context_stride=2)  # which only sets the numbers of the blocks that are there
    with pytest.raises(ValueError, match=r"disable_free_noise replaces .* has an adapter"):
        pipe.disable_free_noise()
    pipe.unload_loca_weights()
    pipe.disable_free_noise()
