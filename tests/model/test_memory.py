"""Adapted models form no reference cycles: what nobody refers to is freed at once, without the garbage collector."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from loca_vision import LoCAConfig, LoRAConfig, inject, remove, set_adapters
from loca_vision.pipeline.attn_processor import LoCAAttnProcessor
from support.adapter_files import IMAGES, tiny
from support.pipelines import inputs_of, text_encoder, unet

CONFIG = LoCAConfig(n_components=10, targets=("q", "v", "out"))


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def adapted_unet() -> Any:
    model = unet()
    inject(model, CONFIG)
    return model


def trained_unet() -> Any:
    model = adapted_unet()
    model(**inputs_of(model)).sample.sum().backward()
    return model


def used_unet() -> Any:
    model = adapted_unet()
    with torch.no_grad():
        model(**inputs_of(model), cross_attention_kwargs={"scale": 0.5})
    return model


def trained_vit() -> nn.Module:
    model = tiny()
    inject(model, CONFIG, "a")
    inject(model, LoRAConfig(r=2), "b")
    model(IMAGES).sum().backward()
    set_adapters(model, "a")
    return model


def bare_again() -> nn.Module:
    model = used_unet()
    remove(model)
    return model  # type: ignore[no-any-return]


def adapted_text_encoder() -> nn.Module:
    model = text_encoder()
    inject(model, CONFIG)
    model(torch.zeros(1, 4, dtype=torch.long))
    return model


def with_processors() -> Any:
    model: Any = unet()
    modules = {path: module for path, module in model.named_modules() if path.endswith(("attn1", "attn2"))}
    model.set_attn_processor({f"{p}.processor": LoCAAttnProcessor.of(m, CONFIG, name=p) for p, m in modules.items()})
    model(**inputs_of(model))
    return model


@pytest.mark.parametrize(
    "make",
    [
        adapted_unet,
        trained_unet,
        used_unet,
        bare_again,
        trained_vit,
        adapted_text_encoder,
        with_processors,
        lambda: copy.deepcopy(used_unet()),
        lambda: pickle.loads(pickle.dumps(adapted_unet())),
    ],
    ids=["unet", "trained", "used", "bare again", "vit", "text encoder", "processors", "copy", "pickle"],
)
def test_a_model_is_freed_with_its_last_reference(make: Callable[[], nn.Module]) -> None:
    model = make()
    left = [weakref.ref(model), *(weakref.ref(parameter) for parameter in model.parameters())]
    del model
    assert not any(reference() is not None for reference in left)


def test_a_copy_saves_itself_and_not_the_original(tmp_path: Any) -> None:
    model = adapted_unet()
    twin, again = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in (twin, again):
        with torch.no_grad():
            other.conv_out.bias.fill_(3.0)
        other.save_pretrained(tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path).conv_out.bias, other.conv_out.bias)
