"""LoCA methods of a pipeline: together with LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig
from torch import Tensor

from support.loader import BOTH
from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    Made,
    assert_near,
    expected,
    listed,
    models,
)


def add_lora(pipe: Any) -> None:
    for model, targets in ((pipe.unet, ["to_q", "to_v", "to_out.0"]), (pipe.text_encoder, ["q_proj", "v_proj"])):
        torch.manual_seed(21)
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False), "lora")


@torch.no_grad()
def lora_in_weights(strength: float = 1.0) -> Any:
    """A pipeline with the same LoRA written into its weights."""
    with_lora, pipe = stable_diffusion(), stable_diffusion()
    add_lora(with_lora)
    for component in ("unet", "text_encoder"):
        plain = getattr(pipe, component)
        for path, layer in getattr(with_lora, component).named_modules():
            if hasattr(layer, "lora_A"):
                update = layer.lora_B["lora"].weight @ layer.lora_A["lora"].weight
                plain.get_submodule(path).weight += strength * layer.scaling["lora"] * update
    return pipe


def both_in_weights(made: Made, loca_strength: float, lora_strength: float) -> Tensor:
    return expected((made, loca_strength), make=lambda: lora_in_weights(lora_strength))


@pytest.mark.parametrize("order", ["lora first", "loca first"])
@pytest.mark.parametrize("out", ["lora", "loca"])
def test_lora_and_loca_come_and_go_by_themselves(order: str, out: str, pipe: Any, base: Tensor, first: Made) -> None:
    keys = {c: set(model.state_dict()) for c, model in models(pipe).items()}
    if order == "lora first":
        add_lora(pipe)
    pipe.load_loca_weights(first.state(), "loca")
    if order == "loca first":
        add_lora(pipe)
    assert_near(picture(pipe), both_in_weights(first, 1.0, 1.0))
    pipe.set_adapters("lora", 0.5)
    pipe.set_loca_adapters("loca", 0.25)
    assert_near(picture(pipe), both_in_weights(first, 0.25, 0.5))
    assert pipe.get_list_adapters() == {"unet": ["lora"], "text_encoder": ["lora"]}
    assert pipe.get_loca_adapters() == listed(BOTH, "loca")
    if out == "lora":
        pipe.unload_lora_weights()
        assert_near(picture(pipe), expected((first, 0.25)))
        pipe.unload_loca_weights()
    else:
        pipe.unload_loca_weights()
        assert_near(picture(pipe), picture(lora_in_weights(0.5)))
        pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), base)
    assert {c: set(model.state_dict()) for c, model in models(pipe).items()} == keys


def test_the_strength_of_a_call_is_for_both(pipe: Any, base: Tensor, first: Made) -> None:
    add_lora(pipe)
    pipe.load_loca_weights(first.state())
    assert_near(picture(pipe, cross_attention_kwargs={"scale": 0.5}), both_in_weights(first, 0.5, 0.5))
    assert_near(picture(pipe), both_in_weights(first, 1.0, 1.0))


def test_disabling_the_one_leaves_the_other(pipe: Any, first: Made) -> None:
    add_lora(pipe)
    pipe.load_loca_weights(first.state())
    pipe.disable_lora()
    assert_near(picture(pipe), expected((first, 1.0)))
    pipe.enable_lora()
    pipe.disable_loca()
    assert_near(picture(pipe), picture(lora_in_weights()))


def test_a_loca_file_holds_no_lora(pipe: Any, first: Made, tmp_path: Path) -> None:
    add_lora(pipe)
    pipe.load_loca_weights(first.state())
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path))
    assert set(tensors) == set(first.tensors)
