"""Sources that a pipeline loads adapters from: components."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from loca_vision import LoCAConfig, active_adapters, adapters, inject, load_adapter, save_adapter
from support.pipelines import picture, stable_diffusion, text_encoder, unet
from support.reference_weights import (
    Made,
    adapter,
    assert_far,
    assert_near,
    config,
    expected,
    metadata,
)
from support.sources import UNET, assert_refused


@torch.no_grad()
def scatter(model: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for spectrum in adapters(model, name).values():
        spectrum.coefficients.copy_(torch.randn(spectrum.coefficients.shape, generator=generator))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_file_of_one_model_goes_into_a_pipeline(component: str, pipe: Any, tmp_path: Path) -> None:
    trained = stable_diffusion()
    model = getattr(trained, component)
    inject(model, LoCAConfig(n_components=9, scale=3.0, targets=("q", "out")), "trained")
    scatter(model, "trained")
    file = save_adapter(model, tmp_path, "trained")
    base = picture(pipe)
    pipe.load_loca_weights(file)
    assert pipe.get_loca_adapters() == {component: ["default_0"]}
    assert torch.equal(picture(pipe), picture(trained))
    assert_far(picture(pipe), base)
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    saved = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path / "again"))
    assert {key.partition(".")[0] for key in saved} == {component}


def test_a_file_of_one_model_with_its_conv_in_goes_into_a_pipeline(pipe: Any, tmp_path: Path) -> None:
    trained = stable_diffusion()
    inject(trained.unet, LoCAConfig(n_components=9), "trained")
    trained.unet.conv_in.requires_grad_(True)
    scatter(trained.unet, "trained")
    with torch.no_grad():
        trained.unet.conv_in.weight.mul_(1.5)
    pipe.load_loca_weights(save_adapter(trained.unet, tmp_path, "trained"))
    assert torch.equal(picture(pipe), picture(trained))


def test_a_file_of_another_model_is_refused(still: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    made = adapter(stable_diffusion(), UNET)
    bare = {key.removeprefix("unet."): value for key, value in made.tensors.items()}
    shapes = {key.removeprefix("unet."): value for key, value in made.about["shapes"].items()}
    about = metadata(config(12, ("q", "v"), 2.0), shapes, base_model="UNet3DConditionModel")
    file = Made(bare, about).write(tmp_path)
    assert_refused(still, ValueError, "it was trained on a UNet3DConditionModel, of which the pipeline has 0", source=file)
    Made(bare, about | {"base_model": "UNet2DConditionModel"}).write(tmp_path)
    pipe = stable_diffusion()
    pipe.load_loca_weights(file)
    assert_near(picture(pipe), expected((made, 1.0)))


def test_a_pipelines_file_of_one_component_goes_into_that_model(pipe: Any, tmp_path: Path) -> None:
    for component, model in (("unet", unet()), ("text_encoder", text_encoder())):
        made = adapter(stable_diffusion(), {component: ("q", "v")}, name="mine")
        names = load_adapter(model, made.write(tmp_path / component))
        prefix = f"{component}.text_model." if component == "text_encoder" else f"{component}."  # which transformers 5 lost
        assert set(names) == {name.removeprefix(prefix) for name in made.updates}
        assert active_adapters(model) == {"mine": 1.0}
        for projection, spectrum in adapters(model, "mine").items():
            assert_near(spectrum.delta().detach().double(), made.updates[f"{prefix}{projection}"])
        setattr(pipe, component, model)
        assert_near(picture(pipe), expected((made, 1.0)))
        pipe.unload_loca_weights()


def test_a_pipelines_file_of_two_components_does_not_go_into_one_model(made: Made, tmp_path: Path) -> None:
    model = unet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"it is for unet, text_encoder of a pipeline: use load_loca_weights"):
        load_adapter(model, made.write(tmp_path))
    assert active_adapters(model) == {}
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in before.items())


def test_a_file_of_the_other_component_does_not_go_into_a_model(tmp_path: Path) -> None:
    model = unet()
    with pytest.raises(ValueError, match=r"the model has no projection .*self_attn\.q"):
        load_adapter(model, adapter(stable_diffusion(), {"text_encoder": ("q",)}).write(tmp_path))
    assert active_adapters(model) == {}
