"""Files and names do not tell how a model is wrapped: compiled by blocks, checkpointed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from loca_vision import inject, load_adapter, remove, save_adapter
from support.adapter_files import CONFIG, IMAGES, PROJECTIONS, tiny, train


def blocks_compiled(model: Any) -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager")
    return model  # type: ignore[no-any-return]


def head_compiled(model: Any) -> nn.Module:
    model.head = torch.compile(model.head, backend="eager")
    return model  # type: ignore[no-any-return]


def blocks_checkpointed(model: Any) -> nn.Module:
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    return model  # type: ignore[no-any-return]


pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo looks at it
WRAPPED = pytest.mark.parametrize("wrap", [blocks_compiled, head_compiled, blocks_checkpointed])


@WRAPPED
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_files_cross_both_ways(wrap: Callable[[Any], nn.Module], wrapped_first: bool, tmp_path: Path) -> None:
    model, twin = (wrap(tiny()), tiny()) if wrapped_first else (tiny(), wrap(tiny()))
    assert inject(model, CONFIG, modules_to_save=["norm"]) == PROJECTIONS
    train(model)
    save_adapter(model, tmp_path)
    base = twin(IMAGES)
    assert load_adapter(twin, tmp_path) == PROJECTIONS
    torch.testing.assert_close(twin(IMAGES), model(IMAGES))
    remove(twin)
    assert torch.equal(twin(IMAGES), base)


@WRAPPED
def test_wrapped_while_adapted(wrap: Callable[[Any], nn.Module]) -> None:
    model = tiny()
    learned = {id(parameter) for parameter in model.parameters()}
    inject(model, CONFIG)
    remove(wrap(model))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert {id(parameter) for parameter in model.parameters()} == learned
