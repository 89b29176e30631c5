"""save_adapter and load_adapter: saving."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from loca_vision import adapters, load_adapter, save_adapter
from loca_vision.formats.adapter_file import FILE_NAME
from loca_vision.formats.match_model import base_model_name, may_be_the_same
from support.adapter_files import NAME, C, L, Q, assert_same, facts, tiny, trained


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: adapters(m)[Q].coefficients.fill_(math.nan), f"{C} holds NaN or infinity as torch.float32"),
        (lambda m: adapters(m)[Q].coefficients.fill_(1e38), f"{C} times the scale 2.0 overflows float32"),
        (lambda m: adapters(m)[Q].locations[3].fill_(math.nan), f"{L} holds NaN or infinity"),
        (lambda m: m.head.bias.fill_(math.inf), "full.head.bias holds NaN or infinity"),
    ],
    ids=["coefficients", "coefficients that add up to infinity", "locations", "head"],
)
def test_what_could_not_be_loaded_is_not_saved(spoil: Callable[[nn.Module], object], words: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"old")
    model = trained()
    with torch.no_grad():
        spoil(model)
    with pytest.raises(ValueError) as caught:
        save_adapter(model, tmp_path / NAME)
    assert words in str(caught.value)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(NAME, b"old")]


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        adapters(model)[Q].coefficients[0] = 65520.0
    with pytest.raises(ValueError, match=r"coefficients holds NaN or infinity as torch\.float16"):
        save_adapter(model, tmp_path / NAME, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    load_adapter(tiny(), save_adapter(model, tmp_path / NAME))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32])
def test_other_dtypes_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"dtype={dtype}: coefficients are stored as"):
        save_adapter(trained(), tmp_path / NAME, dtype=dtype)


def test_where_a_file_may_go(tmp_path: Path) -> None:
    model = trained()
    with pytest.raises(ValueError, match=r"adapter\.bin': expected a file that ends in \.safetensors"):
        save_adapter(model, tmp_path / "adapter.bin")
    with pytest.raises(ValueError, match="no adapter 'other'"):
        save_adapter(model, tmp_path, "other")
    with pytest.raises(ValueError, match="has no adapter"):
        save_adapter(tiny(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert save_adapter(model, tmp_path) == tmp_path / FILE_NAME
    assert save_adapter(model, str(tmp_path / "new" / "folder")) == tmp_path / "new" / "folder" / FILE_NAME
    (tmp_path / "v1.0").mkdir()
    assert save_adapter(model, tmp_path / "v1.0") == tmp_path / "v1.0" / FILE_NAME


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = trained()
    before = facts(model)
    save_adapter(model, tmp_path / NAME)
    assert_same(model, before)


@pytest.mark.parametrize(
    ("about_it", "name"),
    [
        ({"architecture": "vit_tiny", "tag": "augreg"}, "vit_tiny.augreg"),
        ({"architecture": "vit_tiny", "tag": ""}, "vit_tiny"),
        ({}, "Linear"),
        (None, "Linear"),
    ],
)
def test_the_name_of_the_base_model(about_it: dict[str, str] | None, name: str) -> None:
    model = nn.Linear(1, 1)
    model.pretrained_cfg = about_it
    assert base_model_name(model) == name


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ("vit.a", "vit.a", True),
        ("vit.a", "vit.b", False),
        ("vit", "vit.b", True),  # random weights, or from a file: the tag is not known
        ("vit.a", "vit", True),
        ("vit.a", "deit.a", False),
        ("VisionTransformer", "Eva", False),
    ],
)
def test_which_bases_are_told_apart(mine: str, theirs: str, same: bool) -> None:
    assert may_be_the_same(mine, theirs) is same
