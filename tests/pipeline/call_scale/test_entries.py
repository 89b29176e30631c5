"""The scale of a call: pipeline classes tell it to every component, and are restored exactly."""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

import loca_vision.diffusers as loca
from loca_vision.layers import pipeline_call
from loca_vision.layers.pipeline_call import scale_of_the_call
from support.loader import TEXT
from support.pipelines import picture, stable_diffusion
from support.reference_weights import Made, adapter, assert_far, assert_near, expected

HALF = {"cross_attention_kwargs": {"scale": 0.5}}


@pytest.fixture(scope="module")
def text() -> Made:
    return adapter(stable_diffusion(), TEXT, seed=4, size=0.5)


@pytest.fixture
def unregistered() -> Iterator[None]:
    loca.unregister()
    yield
    loca.register()


def test_entries_are_restored_exactly_and_keep_their_signatures(text: Made, unregistered: None) -> None:
    class Mine(StableDiffusionPipeline):  # type: ignore[misc]
        def encode_prompt(self, *inputs: Any, **named: Any) -> Any:
            return super().encode_prompt(*inputs, **named)

    classes = (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline, Mine)
    before = [dict(vars(cls)) for cls in classes]
    call = StableDiffusionPipeline.__call__
    loca.register()
    loca.load_loca_weights(stable_diffusion(), text.state())
    for cls in classes:
        assert cls.encode_prompt is not before[0]["encode_prompt"]
    assert StableDiffusionPipeline.__call__ is not call
    assert inspect.signature(StableDiffusionPipeline.__call__) == inspect.signature(call)
    assert StableDiffusionPipeline.__call__.__doc__ == call.__doc__
    loca.unregister()
    assert [dict(vars(cls)) for cls in classes] == before


def test_what_others_have_put_in_their_place_stays(text: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    loca.load_loca_weights(stable_diffusion(), text.state())

    def mine(self: Any) -> str:
        return "mine"

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", mine)
    try:
        loca.unregister()
        assert StableDiffusionPipeline.__call__ is mine
    finally:
        loca.register()


def test_a_class_made_later_tells_its_scale(text: Made) -> None:
    loca.load_loca_weights(stable_diffusion(), text.state())

    class Later(StableDiffusionPipeline):  # type: ignore[misc]
        def __call__(self, *inputs: Any, own: int = 0, **named: Any) -> Any:
            return super().__call__(*inputs, **named)

    pipe = stable_diffusion(Later)
    pipe.load_loca_weights(text.state())
    assert_near(picture(pipe, own=1, **HALF), expected((text, 0.5)))
    assert list(inspect.signature(Later.__call__).parameters) == ["self", "inputs", "own", "named"]


def test_the_base_class_keeps_the_scale_of_the_call_that_it_is_a_part_of(text: Made) -> None:
    class Forgetful(StableDiffusionPipeline):  # type: ignore[misc]
        def __call__(self, *inputs: Any, cross_attention_kwargs: Any = None, **named: Any) -> Any:
            return super().__call__(*inputs, **named)

    pipe = stable_diffusion(Forgetful)
    pipe.load_loca_weights(text.state())
    assert_near(picture(pipe, **HALF), expected((text, 0.5)))
    assert_near(picture(pipe), expected((text, 1.0)))


def test_a_nested_call_of_another_pipeline_has_its_own_scale(text: Made) -> None:
    outer, inner = stable_diffusion(), stable_diffusion()
    for pipe in (outer, inner):
        pipe.load_loca_weights(text.state())
    shown: dict[str, Any] = {}

    def draw_more(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 0:
            shown["plain"] = picture(inner)
            shown["quarter"] = picture(inner, cross_attention_kwargs={"scale": 0.25})
            shown["words"] = inner.encode_prompt("a cat", "cpu", 1, False)[0]
            shown["around"] = scale_of_the_call()
        return {}

    assert_near(picture(outer, callback_on_step_end=draw_more, **HALF), expected((text, 0.5)))
    assert shown["around"] == 0.5 and scale_of_the_call() == 1.0
    assert_near(shown["plain"], expected((text, 1.0)))
    assert_near(shown["quarter"], expected((text, 0.25)))
    assert torch.equal(shown["words"], inner.encode_prompt("a cat", "cpu", 1, False)[0])


def test_the_way_round_no_grad_has_a_scale_too(text: Made) -> None:
    pipe = stable_diffusion()
    pipe.load_loca_weights(text.state())
    given = {"num_inference_steps": 1, "output_type": "pt", "height": 16, "width": 16}
    shown = StableDiffusionPipeline.__call__.__wrapped__(
        pipe, "a cat", generator=torch.Generator().manual_seed(5), **given, **HALF
    ).images
    assert shown.requires_grad
    assert_near(shown.detach(), expected((text, 0.5)))


def test_a_vae_that_only_decodes_follows_the_scale() -> None:
    made = adapter(stable_diffusion(), {"vae": ("q", "v", "out")}, size=20.0)
    pipe = stable_diffusion()
    pipe.load_loca_weights(made.state())
    assert_far(expected((made, 0.5)), expected((made, 1.0)))
    assert_near(picture(pipe, **HALF), expected((made, 0.5)))
    assert_near(picture(pipe), expected((made, 1.0)))


def test_functions_tell_it_with_nothing_registered(text: Made, unregistered: None) -> None:
    pipe = stable_diffusion()
    loca.load_loca_weights(pipe, text.state())
    assert_near(picture(pipe, **HALF), expected((text, 0.5)))
    loca.register()
    loca.unregister()
    assert_near(picture(pipe), expected((text, 1.0)))


def test_a_class_with_the_mixin_tells_it_whatever_is_registered(text: Made) -> None:
    class Mine(loca.LoCALoaderMixin, StableDiffusionPipeline):  # type: ignore[misc]
        pass

    pipe = stable_diffusion(Mine)
    pipe.load_loca_weights(text.state())
    try:
        for change in (loca.register, loca.unregister):
            change()
            assert_near(picture(pipe, **HALF), expected((text, 0.5)))
    finally:
        loca.register()


def test_what_is_wrong_with_other_arguments_is_said_by_the_pipeline(text: Made) -> None:
    pipe = stable_diffusion()
    pipe.load_loca_weights(text.state())
    with pytest.raises(TypeError, match=r"__call__\(\) got multiple values for argument 'prompt'"):
        pipe("a cat", prompt="a dog")


def test_a_scale_of_a_pipeline_without_adapters_is_diffusers_matter(text: Made) -> None:
    loca.load_loca_weights(stable_diffusion(), text.state())
    plain = stable_diffusion()
    assert torch.equal(picture(plain, cross_attention_kwargs={"scale": None}), picture(stable_diffusion()))


def test_classes_are_wrapped_when_an_adapted_model_arrives(text: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = stable_diffusion()
    pipe.load_loca_weights(text.state())
    torch.save(pipe.text_encoder, tmp_path / "model")
    loca.unregister()
    monkeypatch.setattr(pipeline_call, "_announced", False)  # as in a process that has not seen an adapted model yet
    loca.register()
    assert not hasattr(StableDiffusionPipeline.encode_prompt, "__wrapped__")
    torch.load(tmp_path / "model", weights_only=False)
    assert hasattr(StableDiffusionPipeline.encode_prompt, "__wrapped__")


def test_a_call_keeps_no_pipeline_alive(text: Made) -> None:
    pipe = stable_diffusion()
    pipe.load_loca_weights(text.state())
    picture(pipe, **HALF)
    encoder = weakref.ref(pipe.text_encoder)
    del pipe
    gc.collect()
    assert encoder() is None
