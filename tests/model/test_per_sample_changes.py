"""What becomes of a model while a context is open, and what is left behind when it ends."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Generator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import loca_vision.diffusers  # noqa: F401  which adds the methods
from loca_vision import LoCAConfig, LoRAConfig, inject, per_sample, remove, set_adapters
from support import pipelines
from support.mixed import one_by_one, stir, with_adapters
from support.timm_models import tiny

CONFIGS = {"a": LoCAConfig(n_components=20), "b": LoRAConfig(r=2)}


def add(model: Any, name: str, **settings: Any) -> None:
    inject(model, LoRAConfig(r=2, **settings), name)
    stir(model, name)
    nn.init.normal_(model.head.weight)


def adapted() -> Any:
    model: Any = tiny("vit").eval()
    for name, config in CONFIGS.items():
        inject(model, config, name)
        stir(model, name)
        nn.init.normal_(model.head.weight)
    return model


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_another_head_may_come_into_the_model() -> None:
    model, x = adapted(), images()
    wanted = one_by_one(model, x, ["a", "a"])
    set_adapters(model, "a")  # so that the model holds what both samples need
    with per_sample(model, ["a", "a"]):
        close(model(x), wanted)
        set_adapters(model, "b")
        close(model(x), wanted)


@torch.no_grad()
def test_an_adapter_that_comes_later_acts_on_no_sample() -> None:
    model: Any = tiny("vit").eval()
    add(model, "a", targets=("q",))
    x = images()
    wanted = one_by_one(model, x, ["a", None])
    with per_sample(model, ["a", None]):
        add(model, "later", targets=("fc1",))
        close(model(x), wanted)


@torch.no_grad()
def test_layers_that_lost_their_last_adapter_are_refused() -> None:
    model: Any = tiny("vit").eval()
    add(model, "a")
    with per_sample(model, ["a", None]):
        remove(model)
        with pytest.raises(RuntimeError, match="an adapter of this context was removed meanwhile"):
            model(images())


@torch.no_grad()
def test_an_adapter_that_is_fused_meanwhile_is_refused() -> None:
    unet = pipelines.unet()
    for name, config in CONFIGS.items():
        inject(unet, config, name)
    pipe = pipelines.stable_diffusion()
    pipe.unet = unet
    inputs = pipelines.inputs_of(unet)
    with per_sample(unet, ["a", "b"] * (len(inputs["sample"]) // 2)):
        pipe.fuse_loca(adapter_names=["a"])
        with pytest.raises(ValueError, match="adapter 'a' is fused into the weights"):
            unet(**inputs)


@torch.no_grad()
def test_layers_of_a_later_adapter_are_tried_too() -> None:
    model: Any = tiny("swinv2_cr").eval()
    x = images(4)
    for name in "ab":
        add_plain(model, name, "q")
    with per_sample(model, ["a", "b"] * 2):
        model(x)
    for name in "cd":
        add_plain(model, name, "fc1")  # one of which makes position biases
    with per_sample(model, ["c", "d"] * 2), pytest.raises(ValueError, match="its updates cannot differ"):
        model(x)


def add_plain(model: nn.Module, name: str, target: str) -> None:
    inject(model, LoRAConfig(r=1, targets=(target,)), name)
    stir(model, name)


class Interleaved(nn.Module):
    """A layer sees the first token of every sample, then the second of every sample, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.drop = nn.Linear(8, 8), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        samples, tokens, width = x.shape
        mixed = self.fc1(self.drop(x).transpose(0, 1).reshape(-1, width))
        result: Tensor = mixed.view(tokens, samples, width).transpose(0, 1)
        return result


@pytest.mark.parametrize("training", [False, True])
def test_samples_side_by_side_are_refused(training: bool) -> None:
    model = Interleaved().train(training)
    for name in "ab":
        inject(model, LoRAConfig(r=1, targets=("linear",), layers=["fc1"]), name)
        stir(model, name)
    with per_sample(model, ["a", "b"]), pytest.raises(ValueError, match="not those of one sample after the other"):
        model(torch.randn(2, 4, 8))


@torch.no_grad()
def test_parts_that_are_called_without_the_model_are_held_to_the_batch() -> None:
    model, x = adapted(), torch.randn(4, 17, 48)
    wanted = one_by_one(model, x[:2], ["a", "b"], call=model.blocks)
    with per_sample(model, ["a", "b"]):
        close(model.blocks(x[:2]), wanted)
    with per_sample(model, ["a", "b"]), pytest.raises(ValueError, match=r"has 2 entries.* was called with a batch of 4"):
        model.blocks(x)


@torch.no_grad()
def test_generators_that_mix_contexts_up_are_told_so_and_leave_nothing() -> None:
    model, x = adapted(), images()
    usual = model(x)

    def answers(names: list[str]) -> Generator[Tensor, None, None]:
        with per_sample(model, names):
            while True:
                yield model(x)

    first, second = answers(["a", "a"]), answers(["b", "b"])
    next(first), next(second)
    with pytest.raises(RuntimeError, match="as a generator may do that yields within"):
        first.close()
    second.close()
    close(model(x), usual)


def test_nothing_of_a_call_is_copied_or_keeps_the_model_alive() -> None:
    model = adapted()
    size = len(pickle.dumps(model))
    with per_sample(model, ["a", "b"]):
        model(images())
    assert len(pickle.dumps(model)) < size + 1000
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None


@torch.no_grad()
def test_a_compiled_copy_is_another_model() -> None:
    model, x = adapted(), images()
    with per_sample(model, ["a", "b"]):
        wanted = model(x)
        other = copy.deepcopy(model)
        set_adapters(other, "b")
        alone = other(x)
        torch._dynamo.reset()
        close(torch.compile(other, backend="eager")(x), alone)
    for _ in range(3):
        other = copy.deepcopy(other)
        with per_sample(other, ["a", "b"]):
            close(other(x), wanted)
    assert len(other._forward_pre_hooks) == 1 and len(other.head._forward_hooks) == 1


@torch.no_grad()
def test_after_the_last_adapter_no_hook_is_left_but_for_a_context_that_is_open() -> None:
    def hooks(model: nn.Module) -> int:
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())

    model, x = with_adapters(tiny("vit").eval(), {"a": LoCAConfig(n_components=20)}), torch.randn(2, 3, 32, 32)
    before = hooks(model)
    with per_sample(model, ["a", None]):
        model(x)
    assert hooks(model) > before
    remove(model)
    assert hooks(model) == before
    with_adapters(model, {"a": LoCAConfig(n_components=20)})
    with per_sample(model, ["a", None]):
        remove(model)
        with pytest.raises(RuntimeError, match="was removed meanwhile"):
            model(x)


@torch.no_grad()
def test_nothing_is_merged_while_a_context_is_open() -> None:
    model, x = with_adapters(tiny("vit").eval(), CONFIGS), torch.randn(2, 3, 32, 32)
    with per_sample(model, ["a", "b"]):
        before = model(x)
        with pytest.raises(ValueError, match="merge after it"):
            remove(model, "a", merge=True)
        assert torch.equal(model(x), before)
    remove(model, "a", merge=True)
