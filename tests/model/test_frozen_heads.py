"""What freezes beside an adapter though somebody may count on it is said once."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from loca_vision import LoCAConfig, inject
from support.adapter_files import tiny

CONFIG = LoCAConfig(n_components=10)


class Own(nn.Module):
    """A classifier of one's own around a timm model without a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.fc = tiny(0), nn.Linear(48, 5)


def transformers_vit() -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96}
    model: nn.Module = transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)
    )
    return model


def transformers_bert() -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 96, "vocab_size": 20}
    model: nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    return model


@pytest.mark.parametrize(("make", "part"), [(Own, "fc"), (transformers_bert, "classifier")])
def test_a_head_that_freezes_is_named(make: Any, part: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "loca_vision"):
        inject(make(), CONFIG)
    (record,) = caplog.records
    assert record.getMessage() == f"{part}: frozen, as all but the adapter; to train it, pass modules_to_save=({part!r},)"
    caplog.clear()
    model = make()
    inject(model, CONFIG, modules_to_save=[part])
    assert not caplog.records and all(p.requires_grad for p in model.get_submodule(part).parameters())


def test_what_the_user_had_left_trainable_is_named(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = tiny()
    model.requires_grad_(False)
    for part in (model.head, model.norm, model.blocks[1].mlp):
        part.requires_grad_(True)
    inject(model, CONFIG)
    assert "blocks.1.mlp.fc1, blocks.1.mlp.fc2, norm: frozen" in caplog.text


def test_nothing_is_said_of_an_ordinary_model(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    inject(model, CONFIG)
    inject(model, CONFIG, "second")
    assert not caplog.records


def test_the_heads_of_two_timm_models_stay_trainable() -> None:
    model = nn.ModuleDict({"first": tiny(3), "second": tiny(5)})
    inject(model, CONFIG)
    learned = {name for name, p in model.named_parameters() if p.requires_grad and ".loca." not in name}
    assert learned == {"first.head.weight", "first.head.bias", "second.head.weight", "second.head.bias"}


def test_attention_that_cannot_be_adapted_is_named() -> None:
    model = nn.TransformerEncoderLayer(48, 3, 96)
    with pytest.raises(ValueError, match=r"torch.nn.MultiheadAttention, as at self_attn, keeps q, k and v where they cannot"):
        inject(model, CONFIG)


def test_the_output_projection_of_transformers_vits_is_a_target() -> None:
    model, images = transformers_vit(), torch.rand(2, 3, 32, 32)
    before = model(images).logits
    assert inject(model, LoCAConfig(n_components=10, targets=("out",))) == ("vit.layers.0.attention.out",)
    assert torch.equal(model(images).logits, before)
