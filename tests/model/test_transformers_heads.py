"""The heads of transformers' image classifiers train with an adapter, and travel with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loca_vision import LoCAConfig, inject, load_adapter, remove, save_adapter
from support import transformers_models as hf
from support.formulas import stir

CONFIG = LoCAConfig(n_components=10)
every_family = pytest.mark.parametrize("family", hf.FAMILIES)


def trained(family: str) -> Any:
    """An adapted model whose head has changed too."""
    model = hf.tiny(family)
    inject(model, CONFIG)
    stir(model)
    with torch.no_grad():
        model.classifier.weight += 0.1
        model.classifier.bias -= 0.2
    return model


@every_family
def test_the_head_trains_and_nothing_else_of_the_model(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = hf.tiny(family)
    with caplog.at_level(logging.WARNING, "loca_vision"):
        inject(model, CONFIG)
    assert not [record for record in caplog.records if record.name.startswith("loca_vision")]
    learned = {name for name, p in model.named_parameters() if p.requires_grad and ".loca." not in name}
    assert learned == {"classifier.weight", "classifier.bias"}


@every_family
def test_the_head_travels_with_the_adapter(family: str, tmp_path: Path) -> None:
    model = trained(family)
    wanted = hf.logits(model)
    save_adapter(model, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    assert {key for key in load_file(file) if key.startswith("full.")} == {"full.classifier.weight", "full.classifier.bias"}
    other = hf.tiny(family)
    first = hf.logits(other)
    load_adapter(other, tmp_path)
    assert torch.equal(hf.logits(other), wanted)
    remove(other)
    assert torch.equal(hf.logits(other), first)
    remove(model, merge=True)
    assert torch.allclose(hf.logits(model), wanted, atol=1e-5)


def test_a_head_of_another_number_of_classes_takes_its_place(tmp_path: Path) -> None:
    model = trained("vit")
    wanted = hf.logits(model)
    save_adapter(model, tmp_path)
    other = hf.tiny("vit")
    other.classifier = nn.Linear(48, 5)
    other.config.num_labels = other.num_labels = 5
    first = hf.logits(other)
    load_adapter(other, tmp_path)
    assert torch.equal(hf.logits(other), wanted)
    remove(other)
    assert torch.equal(hf.logits(other), first)


def test_both_heads_of_a_distilled_model_train() -> None:
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**hf.VISION, num_labels=3))
    inject(model, CONFIG)
    learned = {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad and ".loca." not in name}
    assert learned == {"cls_classifier", "distillation_classifier"}


def test_a_model_without_a_head_has_none() -> None:
    transformers: Any = pytest.importorskip("transformers")
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**hf.VISION, num_labels=0))
    inject(model, CONFIG)
    assert all(".loca." in name for name, p in model.named_parameters() if p.requires_grad)
