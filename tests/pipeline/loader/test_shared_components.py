"""LoCA methods of a pipeline: shared components."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoPipelineForImage2Image,
    StableDiffusionImg2ImgPipeline,
)
from torch import Tensor

from support.loader import BOTH
from support.pipelines import picture, quiet, stable_diffusion
from support.reference_weights import (
    Made,
    assert_far,
    assert_near,
    assert_same,
    expected,
    facts,
    listed,
    merged,
)


def picture_to_picture(pipe: Any, **more: Any) -> Tensor:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    generator = torch.Generator().manual_seed(5)
    given = {"image": image, "num_inference_steps": 4, "strength": 0.5, "output_type": "pt", "generator": generator}
    return torch.as_tensor(pipe("a cat", **given | more).images)


def other_pipelines(pipe: Any) -> list[Any]:
    return [quiet(cls.from_pipe(pipe)) for cls in (StableDiffusionImg2ImgPipeline, AutoPipelineForImage2Image)]


def test_pipelines_that_share_components_share_adapters(pipe: Any, first: Made, second: Made) -> None:
    before = facts(pipe)
    pipe.load_loca_weights(first.state(), "first")
    base = picture_to_picture(quiet(StableDiffusionImg2ImgPipeline.from_pipe(stable_diffusion())))
    for other in other_pipelines(pipe):
        assert type(other).__name__ == "StableDiffusionImg2ImgPipeline"
        assert other.get_loca_adapters() == listed(BOTH, "first")
        wanted = quiet(StableDiffusionImg2ImgPipeline.from_pipe(merged((first, 1.0))))
        assert_far(picture_to_picture(other), base)
        assert_near(picture_to_picture(other), picture_to_picture(wanted))
    other.load_loca_weights(second.state(), "second")
    assert pipe.get_active_loca_adapters() == ["second"]
    assert_near(picture(pipe), expected((second, 1.0)))
    pipe.set_loca_adapters(["first"], 0.5)
    assert_near(picture_to_picture(other), picture_to_picture(from_merged(first, 0.5)))
    pipe.unload_loca_weights()
    assert other.get_loca_adapters() == {}
    assert torch.equal(picture_to_picture(other), base)
    assert_same(pipe, before)


def from_merged(made: Made, strength: float) -> Any:
    return quiet(StableDiffusionImg2ImgPipeline.from_pipe(merged((made, strength))))


def test_the_strength_of_a_call_holds_in_every_pipeline_of_the_components(pipe: Any, first: Made) -> None:
    early = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    pipe.load_loca_weights(first.state())
    late = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    for other in (late, early):
        assert_near(picture_to_picture(other), picture_to_picture(from_merged(first, 1.0)))
        half = picture_to_picture(other, cross_attention_kwargs={"scale": 0.5})
        assert_near(half, picture_to_picture(from_merged(first, 0.5)))
        assert_near(picture_to_picture(other), picture_to_picture(from_merged(first, 1.0)))


def test_unloading_from_another_pipeline_gives_this_one_its_class_back(pipe: Any, first: Made) -> None:
    before = facts(pipe)
    other = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    other.load_loca_weights(first.state())
    other.unload_loca_weights()
    assert type(other) is StableDiffusionImg2ImgPipeline
    assert_same(pipe, before)
