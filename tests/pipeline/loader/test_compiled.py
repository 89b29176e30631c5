"""LoCA methods of a pipeline: compiled and offloaded models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload
from diffusers import (
    StableDiffusionPipeline,
)
from torch import Tensor, nn

from loca_vision import LoCAConfig, active_adapters, inject
from support.loader import BOTH, CONV_IN, UNET, shown
from support.pipelines import picture, quiet, stable_diffusion
from support.reference_weights import (
    Made,
    adapter,
    assert_near,
    expected,
    layers,
    listed,
)


def compiled(pipe: Any) -> Any:
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    return pipe


def offloaded(pipe: Any) -> Any:
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    return pipe


@pytest.mark.parametrize("wrap", [compiled, offloaded])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wrapped_unet_answers_as_a_plain_one_does(
    wrap: Callable[[Any], Any], when: str, first: Made, second: Made, base: Tensor, tmp_path: Path
) -> None:
    pipe = stable_diffusion()
    if when == "before":
        wrap(pipe)
    pipe.load_loca_weights(first.state(), "first")
    if when == "after":
        wrap(pipe)
    assert pipe.get_loca_adapters() == listed(BOTH, "first")
    assert pipe.get_active_loca_adapters() == ["first"]
    assert_near(shown(pipe), expected((first, 1.0)))
    pipe.load_loca_weights(second.state(), "second")
    pipe.set_loca_adapters(["first", "second"], [0.5, {"unet": {"down": 0.25}}])

    def strength(name: str) -> float:
        return 0.25 if name.startswith("unet.down_blocks.") else 1.0

    wanted = expected((first, 0.5), (second, strength))
    assert_near(shown(pipe), wanted)
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path, "first"))
    assert all(torch.equal(tensors[key], value) for key, value in first.tensors.items())
    pipe.fuse_loca(scale=0.5, adapter_names=["first"])
    assert pipe.fused_locas == {"first"}
    assert_near(shown(pipe), expected((first, 0.25), (second, strength)))
    pipe.unfuse_loca()
    assert_near(picture(pipe) if when == "before" else shown(pipe), wanted)
    pipe.delete_loca_adapters("second")
    assert_near(shown(pipe), expected((first, 0.5)))
    pipe.disable_loca()
    assert torch.equal(shown(pipe), base)
    pipe.enable_loca()
    pipe.unload_loca_weights()
    assert (pipe.get_loca_adapters(), pipe.get_active_loca_adapters()) == ({}, [])
    assert torch.equal(shown(pipe), base)


def test_a_compiled_pipeline_is_saved_as_its_base(first: Made, base: Tensor, tmp_path: Path) -> None:
    pipe = compiled(stable_diffusion())
    pipe.load_loca_weights(first.state())
    pipe.save_pretrained(tmp_path)
    again = quiet(StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None))
    assert torch.equal(picture(again), base)


def test_an_offloaded_unet_trains_its_conv_in_whole(base: Tensor) -> None:
    pipe = offloaded(stable_diffusion())
    made = adapter(stable_diffusion(), UNET, whole=CONV_IN)
    pipe.load_loca_weights(made.state())
    assert_near(picture(pipe), expected((made, 1.0)))
    pipe.disable_loca()
    assert torch.equal(picture(pipe), base)
    pipe.unload_loca_weights()
    assert torch.equal(picture(pipe), base)


def test_every_layer_of_the_oracle_is_adapted(pipe: Any) -> None:
    """Or the comparisons here would be with too little."""
    for model in (pipe.unet, pipe.text_encoder):
        wanted = {name.removeprefix("" if hasattr(model, "text_model") else "text_model.") for name, _ in layers(model)}
        assert wanted == set(inject(model, LoCAConfig(n_components=2, targets=("q", "k", "v", "out"))))
        assert active_adapters(model) == {"default": 1.0}
        assert isinstance(model, nn.Module)
