"""save_adapter and load_adapter: a model that does not fit the file."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from loca_vision import load_adapter, remove
from loca_vision.formats.adapter_file import nearest
from support.adapter_files import NAME, assert_same, facts, item, tiny, trained
from support.time_limit import within


@pytest.mark.parametrize("name", [None, "default", "../up", "", "a b", "x" * 101])
def test_a_name_in_use_or_unfit(name: str | None, good: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(good)
    model = trained(seed=7)
    before = facts(model)
    with pytest.raises(ValueError, match=r"adapter\.safetensors: name="):
        load_adapter(model, tmp_path / NAME, name)
    assert_same(model, before)
    remove(model)
    assert not hasattr(model, "_loca_record")


def other_depth() -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=48, depth=1, num_heads=3, patch_size=8, img_size=32, num_classes=3
    )
    return model


def other_width() -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=96, depth=2, num_heads=3, patch_size=8, img_size=32, num_classes=3
    )
    return model


def other_kind() -> nn.Module:
    model: nn.Module = timm.create_model("resnet10t", num_classes=3)
    return model


def other_layer() -> nn.Module:
    model = tiny()
    model.blocks[0].attn.qkv = nn.Conv1d(48, 144, 1)
    model.blocks[0].attn.forward = lambda x, **_: x
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tiny(classes=0), "full.head.bias: the model has no parameter head.bias"),
        (other_depth, "the model has no projection blocks.1.attn.q; perhaps blocks.0.attn.q"),
        (other_width, "blocks.0.attn.q is (48, 48) in the file and (96, 96) in the model"),
        (other_kind, "it was trained on vit_tiny_patch16_224.augreg_in21k_ft_in1k; this model is resnet10t"),
        (other_layer, "blocks.0.attn.q is a Conv1d"),
    ],
    ids=["no head", "fewer blocks", "other width", "other family", "other layer"],
)
def test_another_model(build: Callable[[], nn.Module], words: str, good: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(good)
    model = build().eval()
    before = facts(model)
    with pytest.raises(ValueError) as caught:
        load_adapter(model, tmp_path / NAME)
    assert str(caught.value).startswith(f"{tmp_path / NAME}: ") and words in str(caught.value)
    assert_same(model, before)


def test_a_head_that_overflows_the_models_own_dtype(good: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(item("full.head.bias", 1e5)(good))
    model = tiny().half()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"full\.head\.bias overflows torch\.float16"):
        load_adapter(model, tmp_path / NAME)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "_loca_record")


def test_hints_take_no_time() -> None:
    letters = random.Random(0)

    def word(length: int) -> str:
        return "".join(letters.choices([chr(0x4E00 + i) for i in range(120)], k=length))

    with within(20):
        assert nearest(word(100_000), [word(100_000)]) == ""
        nearest(word(200), [word(200) for _ in range(20_000)])
