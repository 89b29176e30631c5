"""Adapters whose heads the model lacks, or has for another number of classes; loading without further training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from loca_vision import (
    adapters,
    disable_adapter,
    inject,
    load_adapter,
    print_trainable_parameters,
    remove,
    rename_adapter,
    save_adapter,
    set_adapters,
)
from support.adapter_files import CONFIG, IMAGES, PROJECTIONS, tiny, train


def body(classes: int = 3) -> Any:
    """One body, whatever the number of classes."""
    model: Any = tiny()
    model.reset_classifier(classes)
    torch.manual_seed(0)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    return model


def finetuned(classes: int, seed: int) -> Any:
    model = body(classes)
    inject(model, CONFIG)
    train(model, seed=seed)
    return model


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, classes, seed in (("three", 3, 1), ("five", 5, 2)):
        save_adapter(finetuned(classes, seed), tmp_path / name)
    return tmp_path


def test_heads_of_several_class_counts_in_one_model(files: Path) -> None:
    model = body()
    before, first = model(IMAGES), model.head.weight
    load_adapter(model, files / "three", "three")
    load_adapter(model, files / "five", "five")
    for name, classes, seed in (("three", 3, 1), ("five", 5, 2)):
        set_adapters(model, name)
        assert model.head.out_features == classes
        assert torch.equal(model(IMAGES), finetuned(classes, seed)(IMAGES))
        save_adapter(model, files / "again", name)
        twin = body(classes)
        load_adapter(twin, files / "again")
        assert torch.equal(twin(IMAGES), model(IMAGES))
    with disable_adapter(model):
        assert torch.equal(model(IMAGES), before)
    remove(model)
    assert torch.equal(model(IMAGES), before) and model.head.out_features == 3 and model.head.weight is first


def test_a_model_without_a_head_is_told_how(files: Path) -> None:
    model = body(0)
    with pytest.raises(ValueError, match=r"full\.head\.bias: the model has no parameter head\.bias; .*head=False"):
        load_adapter(model, files / "three")
    assert load_adapter(model, files / "three", head=False) == PROJECTIONS
    expected = finetuned(3, 1)
    assert torch.equal(model(IMAGES), expected.forward_head(expected.forward_features(IMAGES), pre_logits=True))


def test_a_model_that_keeps_its_own_head(files: Path) -> None:
    model = body(5)
    head = model.head.weight.clone()
    load_adapter(model, files / "three", head=False)
    assert torch.equal(model.head.weight, head) and model(IMAGES).shape == (2, 5)


def test_features_of_a_vision_transformer(files: Path) -> None:
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}
    model: Any = timm.create_model("vit_tiny_patch16_224", features_only=True, out_indices=(0, 1), **sizes).eval()
    whole = finetuned(3, 1)
    own = {name: value for name, value in whole.state_dict().items() if ".loca." not in name}
    model.model.load_state_dict(own, strict=False)
    assert load_adapter(model, files / "three", head=False) == PROJECTIONS
    expected = whole.forward_intermediates(IMAGES, indices=(0, 1), intermediates_only=True)
    for mine, theirs in zip(model(IMAGES), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_half_a_head_of_another_class_count_is_refused(files: Path) -> None:
    model = body(4)
    model.head = torch.nn.Linear(47, 4)
    with pytest.raises(ValueError, match=r"full\.head\.weight is \(3, 48\) in the file and \(4, 47\) in the model"):
        load_adapter(model, files / "three")


def test_a_loaded_adapter_may_stay_as_it_is(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny()
    load_adapter(model, files / "three", "old", trainable=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="has no trainable adapter"):
        print_trainable_parameters(model)
    inject(model, CONFIG, "new")
    assert not any(p.requires_grad for update in adapters(model, "old").values() for p in update.parameters())
    assert all(p.requires_grad for update in adapters(model, "new").values() for p in update.parameters())
    print_trainable_parameters(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    trained_numbers = 4 * 20 * 3 + 48 * 3 + 3
    assert capsys.readouterr().out == (
        f"trainable params: {trained_numbers} (coefficients 80, locations 160, head 147) || all params: {total:,} || "
        f"trainable%: {100 * trained_numbers / total:.4f}\n"
    )


def test_another_name_goes_into_the_file(files: Path) -> None:
    model = tiny()
    load_adapter(model, files / "three", "old")
    adapted = model(IMAGES)
    rename_adapter(model, "old", "new")
    assert torch.equal(model(IMAGES), adapted)
    with pytest.raises(ValueError, match="no adapter 'old'"):
        rename_adapter(model, "old", "other")
    with pytest.raises(ValueError, match="letters, digits"):
        rename_adapter(model, "new", "a/b")
    save_adapter(model, files / "new", "new")
    twin = tiny()
    load_adapter(twin, files / "new")
    assert list(adapters(twin, "new")) == list(PROJECTIONS)
