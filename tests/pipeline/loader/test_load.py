"""LoCA methods of a pipeline: loading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from loca_vision import LoCAConfig, adapters, inject, remove
from support.loader import BOTH, TEXT, UNET
from support.pipelines import instruct_pix2pix, picture, stable_diffusion, stable_diffusion_xl
from support.reference_weights import (
    METADATA_KEY,
    Made,
    adapter,
    assert_far,
    assert_near,
    assert_same,
    expected,
    facts,
    listed,
    models,
)


@pytest.mark.parametrize("make", [stable_diffusion, instruct_pix2pix, stable_diffusion_xl])
def test_the_picture_is_that_of_the_updated_weights(make: Callable[[], Any]) -> None:
    pipe = make()
    before = facts(pipe)
    every = {component: ("q", "k", "v", "out") for component in models(pipe) if component != "vae"}
    made = adapter(make(), every, seed=3)
    pipe.load_loca_weights(made.state())
    assert pipe.get_loca_adapters() == listed(every, "default_0")
    assert_far(picture(pipe), before["picture"])
    assert_near(picture(pipe), expected((made, 1.0), make=make))
    pipe.unload_loca_weights()
    assert_same(pipe, before)


@pytest.mark.parametrize("parts", [UNET, TEXT, BOTH], ids=["unet", "text encoder", "both"])
def test_any_of_the_components_may_be_adapted(parts: dict[str, Any], pipe: Any, base: Tensor) -> None:
    made = adapter(stable_diffusion(), parts, seed=4)
    pipe.load_loca_weights(made.state())
    assert pipe.get_loca_adapters() == listed(parts, "default_0")
    assert_far(picture(pipe), base)
    assert_near(picture(pipe), expected((made, 1.0)))


def test_one_of_two_text_encoders() -> None:
    pipe = stable_diffusion_xl()
    made = adapter(stable_diffusion_xl(), {"text_encoder_2": ("q", "v")}, size=4.0)
    pipe.load_loca_weights(made.state())
    assert pipe.get_loca_adapters() == {"text_encoder_2": ["default_0"]}
    assert_far(picture(pipe), picture(stable_diffusion_xl()))
    assert_near(picture(pipe), expected((made, 1.0), make=stable_diffusion_xl))


def test_counts_may_differ_from_projection_to_projection(pipe: Any, tmp_path: Path) -> None:
    made = adapter(stable_diffusion(), BOTH, n=lambda name: 3 + sum(map(ord, name)) % 17)
    assert len(set(made.about["config"]["unet"]["n_components"].values())) > 3
    pipe.load_loca_weights(made.state())
    assert_near(picture(pipe), expected((made, 1.0)))
    file = pipe.save_loca_weights(tmp_path)
    with safetensors.safe_open(file, "pt") as opened:
        saved = json.loads(opened.metadata()[METADATA_KEY])
    assert saved["config"] == made.about["config"]


def test_names_by_default(pipe: Any, first: Made, second: Made) -> None:
    for number, made in enumerate((first, second, first)):
        pipe.load_loca_weights(made.state())
        assert pipe.get_active_loca_adapters() == [f"default_{number}"]
    assert pipe.get_loca_adapters() == listed(BOTH, "default_0", "default_1", "default_2")
    pipe.delete_loca_adapters("default_0")
    pipe.load_loca_weights(second.state())
    assert set(pipe.get_loca_adapters()["unet"]) == {"default_0", "default_1", "default_2"}
    assert_near(picture(pipe), expected((second, 1.0)))


def test_the_new_adapter_is_the_only_active_one_in_all_components(pipe: Any, first: Made) -> None:
    narrow = adapter(stable_diffusion(), UNET, seed=5)
    pipe.load_loca_weights(first.state(), "wide")
    pipe.set_loca_adapters("wide", 0.3)
    pipe.disable_loca()
    pipe.load_loca_weights(narrow.state(), "narrow")
    assert pipe.get_active_loca_adapters() == ["narrow"]
    assert pipe.get_loca_adapters() == {"unet": ["wide", "narrow"], "text_encoder": ["wide"]}
    assert_near(picture(pipe), expected((narrow, 1.0)))


@pytest.mark.parametrize("made_for", [UNET, TEXT, BOTH], ids=["unet", "text encoder", "both"])
def test_a_name_in_use_anywhere_is_refused(made_for: dict[str, Any], pipe: Any, first: Made) -> None:
    inject(pipe.unet, LoCAConfig(n_components=4), "taken")
    before = facts(pipe)
    with pytest.raises(ValueError, match="adapter_name='taken': the pipeline has an adapter of that name"):
        pipe.load_loca_weights(adapter(stable_diffusion(), made_for).state(), "taken")
    assert_same(pipe, before)


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a b", "x" * 101, 7, "é"])
def test_an_unfit_name_is_refused(name: Any, bare: Any, first: Made) -> None:
    before = facts(bare)
    with pytest.raises(ValueError, match="an adapter's name is 1 to 100 letters"):
        bare.load_loca_weights(first.state(), name)
    assert_same(bare, before)


def test_what_is_loaded_does_not_learn_and_freezes_nothing(pipe: Any, first: Made) -> None:
    pipe.unet.conv_in.requires_grad_(False)
    before = {key: p.requires_grad for key, p in pipe.unet.named_parameters()}
    pipe.load_loca_weights(first.state())
    after = {key: p.requires_grad for key, p in pipe.unet.named_parameters()}
    assert {key: after[key] for key in before} == before
    new = set(after) - set(before)
    assert len(new) == 2 * len(adapters(pipe.unet, "default_0")) and not any(after[key] for key in new)


def test_an_adapter_put_in_with_inject_is_one_of_the_pipelines(pipe: Any, base: Tensor, tmp_path: Path) -> None:
    inject(pipe.unet, LoCAConfig(n_components=9, scale=3.0, targets=("q", "out")), "mine")
    with torch.no_grad():
        for spectrum in adapters(pipe.unet, "mine").values():
            spectrum.coefficients.normal_()
    assert pipe.get_loca_adapters() == {"unet": ["mine"]} and pipe.get_active_loca_adapters() == ["mine"]
    shown = picture(pipe)
    assert_far(shown, base)
    file = pipe.save_loca_weights(tmp_path, "mine")
    other = stable_diffusion()
    other.load_loca_weights(file)
    assert torch.equal(picture(other), shown)
    pipe.fuse_loca()
    assert pipe.fused_locas == {"mine"}
    pipe.unfuse_loca()
    pipe.disable_loca()
    assert torch.equal(picture(pipe), base)
    pipe.set_loca_adapters("mine")
    assert torch.equal(picture(pipe), shown)
    pipe.load_loca_weights(file)
    assert pipe.get_loca_adapters() == {"unet": ["mine", "default_0"]}
    pipe.delete_loca_adapters("mine")
    assert torch.equal(picture(pipe), shown)
    pipe.unload_loca_weights()
    assert torch.equal(picture(pipe), base)


def test_loading_next_to_an_injected_adapter_keeps_it_trainable(pipe: Any, first: Made) -> None:
    inject(pipe.unet, LoCAConfig(n_components=9), "mine")
    learning = {key for key, p in pipe.unet.named_parameters() if p.requires_grad}
    pipe.load_loca_weights(first.state(), "loaded")
    assert {key for key, p in pipe.unet.named_parameters() if p.requires_grad} == learning
    pipe.delete_loca_adapters("loaded")
    assert {key for key, p in pipe.unet.named_parameters() if p.requires_grad} == learning


def test_an_adapter_taken_out_by_remove_is_gone_from_the_pipeline(pipe: Any, first: Made) -> None:
    before = facts(pipe)
    pipe.load_loca_weights(first.state(), "one")
    remove(pipe.unet, "one")
    assert pipe.get_loca_adapters() == {"text_encoder": ["one"]}
    pipe.unload_loca_weights()
    assert_same(pipe, before)


def test_what_was_loaded_in_inference_mode_works_outside_of_it(pipe: Any, first: Made) -> None:
    with torch.inference_mode():
        pipe.load_loca_weights(first.state())
        assert_near(picture(pipe), expected((first, 1.0)))
    assert_near(picture(pipe), expected((first, 1.0)))
    pipe.unet.train()
    out = pipe.unet(torch.randn(1, 4, 8, 8, requires_grad=True), 3, torch.randn(1, 6, 24)).sample
    out.sum().backward()
    pipe.unload_loca_weights()


def test_the_base_can_be_loaded_beneath_adapters(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state())
    pipe.fuse_loca()
    pipe.unfuse_loca()
    for component, model in models(stable_diffusion()).items():
        getattr(pipe, component).load_state_dict(model.state_dict())
    assert_near(picture(pipe), expected((first, 1.0)))
