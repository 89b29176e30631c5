"""Every verb fails once in each of its steps, and the model is as it was before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from loca_vision import (
    LoCAConfig,
    LoRAConfig,
    disable_adapter,
    inject,
    load_adapter,
    parameter_groups,
    remove,
    rename_adapter,
    save_adapter,
    set_adapters,
)
from loca_vision.pipeline.fuse import fuse, unfuse
from support.adapter_files import IMAGES, tiny, train, trained
from support.injected_failures import assert_same, everything, fail_in, functions_called

VERBS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "inject": lambda model, folder: inject(model, LoRAConfig(r=2), "new", modules_to_save=["norm", "pos_embed"]),
    "load_adapter": lambda model, folder: load_adapter(model, folder, "new"),
    "load_adapter with another head": lambda model, folder: load_adapter(model, folder / "five", "new", trainable=False),
    "set_adapters": lambda model, folder: set_adapters(model, ["a", "b"], [0.5, 2.0]),
    "set_adapters to none": lambda model, folder: set_adapters(model, []),
    "disable_adapter": lambda model, folder: disable_adapter(model).__enter__(),
    "rename_adapter": lambda model, folder: rename_adapter(model, "a", "c"),
    "remove one": lambda model, folder: remove(model, "b"),
    "remove all": lambda model, folder: remove(model),
    "merge one": lambda model, folder: remove(model, "b", merge=True),
    "merge all": lambda model, folder: remove(model, merge=True),
    "fuse": lambda model, folder: fuse(model, {"b": 1.0}),
    "unfuse": lambda model, folder: unfuse(model),
    "save_adapter": lambda model, folder: save_adapter(model, folder / "saved", "a"),
    "parameter_groups": lambda model, folder: parameter_groups(model, lr=0.1),
}


def two_adapters(verb: str) -> nn.Module:
    model = trained(name="a", depth=1)
    inject(model, LoCAConfig(n_components=5, targets=("q", "out", "fc1")), "b")
    train(model, "b", seed=2)
    if verb == "unfuse":
        fuse(model, {"b": 0.5})
    F.cross_entropy(model(IMAGES), torch.tensor([0, 2])).backward()
    return model


@pytest.mark.parametrize("verb", VERBS)
def test_what_fails_half_way_leaves_the_model_as_it_was(verb: str, tmp_path: Path) -> None:
    save_adapter(trained(name="c", seed=3, depth=1), tmp_path, "c")
    save_adapter(trained(name="d", seed=4, classes=5, depth=1), tmp_path / "five", "d")
    model = two_adapters(verb)
    before = everything(model, lambda: model(IMAGES))
    act = VERBS[verb]
    other = two_adapters(verb)
    steps = functions_called(lambda: act(other, tmp_path))
    assert len(steps) > 3
    for step in steps:
        assert fail_in(step, lambda: act(model, tmp_path)), step
        assert_same(everything(model, lambda: model(IMAGES)), before, step)


@pytest.mark.parametrize("verb", ["inject", "load_adapter"])
def test_the_first_adapter_fails_half_way(verb: str, tmp_path: Path) -> None:
    save_adapter(trained(name="c", seed=3, depth=1), tmp_path, "c")
    model = tiny(depth=1)
    before = everything(model, lambda: model(IMAGES))
    other = tiny(depth=1)
    for step in functions_called(lambda: VERBS[verb](other, tmp_path)):
        assert fail_in(step, lambda: VERBS[verb](model, tmp_path)), step
        assert_same(everything(model, lambda: model(IMAGES)), before, step)
