"""Sources that a pipeline loads adapters from: state dicts."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    METADATA_KEY,
    Made,
    adapter,
    assert_near,
    assert_same,
    expected,
    facts,
)
from support.sources import PARTS, UNET, C, L, assert_refused


def test_a_state_dict_is_neither_changed_nor_kept(pipe: Any, made: Made, wanted: Tensor) -> None:
    state = made.state()
    held = dict(state)
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    pipe.load_loca_weights(state)
    assert list(state) == list(before) and all(state[key] is held[key] for key in held)
    assert all(torch.equal(held[key], value) for key, value in before.items() if isinstance(value, Tensor))
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()
    state.clear()
    assert_near(picture(pipe), wanted)


def test_whole_tensors_of_a_state_dict_are_not_kept_either(pipe: Any) -> None:
    made = adapter(stable_diffusion(), UNET, whole=["unet.conv_in.weight"])
    state = made.state()
    pipe.load_loca_weights(state)
    pipe.disable_loca()
    state["full.unet.conv_in.weight"].zero_()
    pipe.enable_loca()
    assert torch.equal(pipe.unet.conv_in.weight, made.whole["unet.conv_in.weight"])


def test_tensors_of_a_state_dict_may_be_views_that_learn(pipe: Any, made: Made, wanted: Tensor) -> None:
    def strided(value: Tensor) -> Tensor:
        wide = torch.stack([value, torch.zeros_like(value)], dim=1)
        return (wide.requires_grad_() if value.is_floating_point() else wide)[:, 0]

    state = {key: strided(value) if isinstance(value, Tensor) else value for key, value in made.state().items()}
    pipe.load_loca_weights(state)
    assert_near(picture(pipe), wanted)


def test_without_metadata_the_scale_is_one_and_the_log_says_so_once(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = adapter(stable_diffusion(), PARTS, scale=1.0, n=lambda name: 5 + len(name) % 3)
    with caplog.at_level(logging.INFO):
        pipe.load_loca_weights(made.tensors, "bare")
    assert [(record.levelname, "scale" in record.getMessage()) for record in caplog.records] == [("WARNING", True)]
    assert_near(picture(pipe), expected((made, 1.0)))
    assert METADATA_KEY not in made.tensors


def test_a_state_dict_without_metadata_may_have_whole_tensors(pipe: Any) -> None:
    before = facts(pipe)
    made = adapter(stable_diffusion(), UNET, scale=1.0, whole=["unet.conv_in.weight", "unet.conv_in.bias"])
    pipe.load_loca_weights(made.tensors)
    assert_near(picture(pipe), expected((made, 1.0)))
    pipe.unload_loca_weights()
    assert_same(pipe, before)


def test_it_is_saved_with_its_metadata(pipe: Any, tmp_path: Path) -> None:
    made = adapter(stable_diffusion(), PARTS, scale=1.0)
    pipe.load_loca_weights(made.tensors)
    shown, file = picture(pipe), pipe.save_loca_weights(tmp_path)
    pipe.unload_loca_weights()
    pipe.load_loca_weights(file)
    assert torch.equal(picture(pipe), shown)


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    def change(state: dict[str, Any]) -> None:
        state[new] = state.pop(old)

    return change


BARE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nothing": (lambda s: s.clear(), "no key ends in .coefficients"),
    "locations alone": (
        lambda s: [s.pop(key) for key in list(s) if key.endswith("coefficients")],
        "no key ends in .coefficients",
    ),
    "a LoRA's keys": (lambda s: s.update({"unet.to_q.lora_A.weight": torch.ones(2, 2)}), "unet.to_q.lora_A.weight is unknown"),
    "a misspelt projection": (
        renamed(C, C.replace("mid_block", "middle_block")),
        "the pipeline has no projection unet.middle_block",
    ),
    "no component": (renamed(C, C.removeprefix("unet.")), "the pipeline has no projection mid_block"),
    "an unknown component": (renamed(C, C.replace("unet", "transformer", 1)), "the pipeline has no projection transformer."),
    "coefficients missing": (lambda s: s.pop(C), f"{L} is unknown"),
    "locations missing": (lambda s: s.pop(L), f"{L} is missing"),
    "NaN": (lambda s: s[C].fill_(math.nan), f"{C} holds NaN"),
    "infinity": (lambda s: s[C].fill_(math.inf), f"{C} holds NaN or infinity"),
    "a location outside": (lambda s: s[L].fill_(32 * 32), f"{L} holds 1024"),
    "a negative location": (lambda s: s[L].fill_(-1), f"{L} holds -1"),
    "float locations": (lambda s: s.update({L: s[L].float()}), f"{L} has dtype F32"),
    "coefficients of bfloat16": (lambda s: s.update({C: s[C].bfloat16()}), f"{C} has dtype BF16"),
    "complex coefficients": (lambda s: s.update({C: s[C].to(torch.complex64)}), "torch.complex64"),
    "coefficients of two axes": (lambda s: s.update({C: s[C].view(3, 4)}), f"{C} has shape (3, 4)"),
    "a tensor without values": (lambda s: s.update({C: s[C].to("meta")}), C),
    "a sparse tensor": (lambda s: s.update({C: s[C].to_sparse()}), C),
    "a list for a tensor": (lambda s: s.update({C: s[C].tolist()}), f"{C!r} holds a list"),
    "a key that is not a text": (lambda s: s.update({3: torch.ones(1)}), "3 holds a"),
    "an unknown whole tensor": (lambda s: s.update({"full.unet.conv.weight": torch.ones(1)}), "no parameter conv.weight"),
    "a whole tensor of another shape": (lambda s: s.update({"full.unet.conv_in.bias": torch.ones(3)}), "conv_in.bias is (3,)"),
    "a whole tensor of no component": (lambda s: s.update({"full.conv_in.bias": torch.ones(16)}), "conv_in"),
    "metadata of no use": (lambda s: s.update({METADATA_KEY: "{}"}), f"{METADATA_KEY}: it is not an object with"),
    "metadata that is not a text": (lambda s: s.update({METADATA_KEY: 7}), f"{METADATA_KEY}: it is not an object with"),
    "metadata that is a tensor": (lambda s: s.update({METADATA_KEY: torch.ones(2)}), "state dict"),
}


@pytest.mark.parametrize("case", BARE)
def test_a_wrong_state_dict_is_refused(case: str, still: tuple[Any, dict[str, Any]], made: Made) -> None:
    change, words = BARE[case]
    state: dict[str, Any] = {key: value.clone() for key, value in made.tensors.items()}
    change(state)
    assert_refused(still, ValueError, "state dict: ", words, source=state)
