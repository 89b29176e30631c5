"""LoCA methods of a pipeline: the scale of a call."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loca_vision import LoCAConfig, adapters, inject
from support.loader import BOTH, TEXT, UNET
from support.pipelines import instruct_pix2pix, picture, stable_diffusion, stable_diffusion_xl
from support.reference_weights import (
    Made,
    adapter,
    assert_far,
    assert_near,
    assert_same,
    expected,
    facts,
    merged,
    models,
)


@pytest.mark.parametrize("parts", [UNET, TEXT, BOTH], ids=["unet", "text encoder", "both"])
def test_a_call_has_its_own_strength(parts: dict[str, Any], pipe: Any, base: Tensor) -> None:
    made = adapter(stable_diffusion(), parts, seed=4, size=0.5)
    pipe.load_loca_weights(made.state())
    shown = picture(pipe)
    assert_far(shown, base)
    for strength in (0.5, -1.0, 3):
        assert_near(picture(pipe, cross_attention_kwargs={"scale": strength}), expected((made, float(strength))))
        assert torch.equal(picture(pipe), shown)
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0}), base)
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 1.0}), shown)
    assert torch.equal(picture(pipe, cross_attention_kwargs={}), shown)
    assert torch.equal(picture(pipe, cross_attention_kwargs=None), shown)


def test_it_multiplies_the_weights_set_before(pipe: Any, base: Tensor, first: Made, second: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(second.state(), "second")
    pipe.set_loca_adapters(["first", "second"], [0.5, {"unet": 0.8, "text_encoder": 0.2}])
    shown = picture(pipe)

    def strength(name: str) -> float:
        return 0.8 if name.startswith("unet") else 0.2

    assert_near(shown, expected((first, 0.5), (second, strength)))
    half = picture(pipe, cross_attention_kwargs={"scale": 0.5})
    assert_near(half, expected((first, 0.25), (second, lambda name: strength(name) / 2)))
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    assert torch.equal(picture(pipe), shown)


def test_it_holds_for_adapters_put_in_with_inject(pipe: Any, base: Tensor) -> None:
    for model in (pipe.unet, pipe.text_encoder):
        inject(model, LoCAConfig(n_components=9, scale=3.0), "mine")
        with torch.no_grad():
            for spectrum in adapters(model, "mine").values():
                spectrum.coefficients.normal_()
    half = picture(pipe, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    pipe.set_loca_adapters("mine", 0.5)
    assert_near(picture(pipe), half)


def test_a_call_that_fails_leaves_no_strength_behind(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state())
    shown = picture(pipe)

    def fails(*_: Any) -> Any:
        raise RuntimeError("stopped by the user")

    with pytest.raises(RuntimeError, match="stopped by the user"):
        picture(pipe, cross_attention_kwargs={"scale": 0.2}, callback_on_step_end=fails)
    ids = pipe.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert_near(pipe.text_encoder(ids)[0], merged((first, 1.0)).text_encoder(ids)[0])
    assert torch.equal(picture(pipe), shown)


def test_prompts_encoded_beforehand_have_a_strength_too(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state())
    for strength in (None, 0.5, 0.0):
        with torch.no_grad():
            found = pipe.encode_prompt("a cat", "cpu", 1, False, lora_scale=strength)[0]
            wanted = merged((first, 1.0 if strength is None else strength))
            assert_near(found, wanted.encode_prompt("a cat", "cpu", 1, False)[0])


@pytest.mark.parametrize("scale", ["0.5", math.nan, math.inf, None, True, [0.5]], ids=str)
def test_a_strength_that_is_no_number_is_refused(scale: Any, pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state())
    before = facts(pipe)
    with pytest.raises(ValueError, match=r"scale=.*: expected a finite number"):
        picture(pipe, cross_attention_kwargs={"scale": scale})
    assert_same(pipe, before)


@pytest.mark.parametrize("make", [instruct_pix2pix, stable_diffusion_xl])
def test_other_pipelines_take_it_too(make: Callable[[], Any]) -> None:
    pipe = make()
    made = adapter(make(), {component: ("q", "v") for component in models(pipe) if component != "vae"}, size=2.0)
    pipe.load_loca_weights(made.state())
    assert_near(picture(pipe, cross_attention_kwargs={"scale": 0.5}), expected((made, 0.5), make=make))
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), picture(make()))
    assert_near(picture(pipe), expected((made, 1.0), make=make))


def test_what_else_is_in_the_mapping_reaches_the_processors(pipe: Any, first: Made) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    class Listening(AttnProcessor):
        heard: tuple[Any, ...] = ()

        def __call__(self, attn: Any, hidden_states: Any, *args: Any, word: str = "", **named: Any) -> Any:
            Listening.heard = (*Listening.heard, word)
            return super().__call__(attn, hidden_states, *args, **named)

    pipe.unet.set_attn_processor(Listening())
    pipe.load_loca_weights(first.state())
    given = {"scale": 0.5, "word": "hello"}
    assert_near(picture(pipe, cross_attention_kwargs=given), expected((first, 0.5)))
    assert set(Listening.heard) == {"hello"}
    assert given == {"scale": 0.5, "word": "hello"}


def test_nothing_is_said_about_what_works(
    pipe: Any, first: Made, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import diffusers
    import transformers

    names = [
        None,
        *(name for name in logging.Logger.manager.loggerDict if name.startswith(("diffusers", "transformers", "loca"))),
    ]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level) for logger in loggers]
    diffusers.logging.enable_propagation()
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.INFO):
            for logger in loggers:
                logger.setLevel(logging.INFO)
            capfd.readouterr()
            pipe.load_loca_weights(first.write(tmp_path))
            picture(pipe, cross_attention_kwargs={"scale": 0.5})
            picture(pipe)
            pipe.set_loca_adapters("default_0", {"unet": {"mid": 0.5}})
            pipe.save_loca_weights(tmp_path / "again")
            pipe.fuse_loca()
            pipe.unfuse_loca()
            pipe.unload_loca_weights()
            said = capfd.readouterr()
            hearing = {"diffusers.pipelines", "transformers.models", "loca_vision.pipeline.loader", "anyone"}
            for name in hearing:
                logging.getLogger(name).info("heard")
    finally:
        diffusers.logging.disable_propagation()
        transformers.logging.disable_propagation()
        for logger, level in before:
            logger.setLevel(level)
    assert {(record.name, record.getMessage()) for record in caplog.records} == {(name, "heard") for name in hearing}
    assert said == ("", "")
