"""Quantised layers of timm models: updates act beside them, and nothing is written into them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loca_vision import LoCAConfig, LoRAConfig, adapters, explain, inject, remove
from support.adapter_files import IMAGES, tiny
from support.quantised import QUANTISED

KINDS = pytest.mark.parametrize("kind", QUANTISED)
CONFIG = LoCAConfig(n_components=40)


def quantised(kind: str) -> Any:
    model: Any = tiny()
    for block in model.blocks:
        block.attn.qkv = QUANTISED[kind](block.attn.qkv)
    return model


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for update in adapters(model).values():
            update.coefficients.normal_()


def expected(kind: str, adapted: nn.Module) -> Tensor:
    """The quantised layer's own answer, and the update's term beside it."""
    model = quantised(kind)
    for projection, update in adapters(adapted).items():
        path, part = projection.rsplit(".", 1)
        delta, start = update.delta().detach(), 48 * "qkv".index(part)

        def add(module: nn.Module, inputs: Any, answer: Tensor, delta: Tensor = delta, start: int = start) -> Tensor:
            answer = answer.clone()
            answer[..., start : start + 48] += F.linear(inputs[0], delta)
            return answer

        model.get_submodule(f"{path}.qkv").register_forward_hook(add)
    result: Tensor = model(IMAGES).detach()
    return result


@KINDS
def test_the_update_acts_beside_the_layer(kind: str) -> None:
    model, base = quantised(kind), quantised(kind)(IMAGES)
    inject(model, CONFIG)
    torch.testing.assert_close(model(IMAGES), base)
    randomise(model)
    wanted = expected(kind, model)
    assert (wanted - base).abs().max() > 0.05
    torch.testing.assert_close(model(IMAGES).detach(), wanted, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(IMAGES), wanted, rtol=1e-4, atol=1e-5)
        if kind != "disguised":  # whose tensors dynamo cannot follow
            compiled = torch.compile(model, backend="eager")
            torch.testing.assert_close(compiled(IMAGES), wanted, rtol=1e-4, atol=1e-5)
    explain(model, 17)
    remove(model)
    assert torch.equal(model(IMAGES), base)


@KINDS
def test_gradients_are_those_of_the_plain_model_with_the_same_weights(kind: str) -> None:
    model = quantised(kind)
    inject(model, CONFIG)
    randomise(model)
    plain: Any = tiny()
    for mine, theirs in zip(quantised(kind).blocks, plain.blocks, strict=True):
        units = torch.eye(48)
        theirs.attn.qkv.weight.data = (mine.attn.qkv(units) - mine.attn.qkv.bias).detach().T.contiguous()
    inject(plain, CONFIG)
    randomised = adapters(plain)
    for name, update in adapters(model).items():
        randomised[name].load_state_dict(update.state_dict())
    for each in (model, plain):
        each(IMAGES).square().sum().backward()
    for name, update in adapters(model).items():
        for mine, theirs in zip(update.parameters(), randomised[name].parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-5)


@KINDS
def test_merging_is_refused_and_changes_nothing(kind: str) -> None:
    model = quantised(kind)
    inject(model, CONFIG)
    randomise(model)
    before = model(IMAGES)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv is a \w+ without a plain floating-point weight"):
        remove(model, merge=True)
    assert torch.equal(model(IMAGES), before)


@KINDS
def test_what_depends_on_the_weight_is_refused(kind: str) -> None:
    model = quantised(kind)
    with pytest.raises(ValueError, match="its weight is not a plain floating-point matrix, on which the adapter depends"):
        inject(model, LoRAConfig(r=2, use_dora=True))
    assert torch.equal(model(IMAGES), quantised(kind)(IMAGES))


def test_a_layer_that_is_read_and_not_called_is_refused() -> None:
    model: Any = timm.create_model("beit_base_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=1, num_heads=3)
    model.blocks[0].attn.qkv = disguise_without_bias(model.blocks[0].attn.qkv)
    with pytest.raises(TypeError, match="reads its weight without calling the layer"):
        inject(model, CONFIG)


def disguise_without_bias(layer: nn.Linear) -> nn.Linear:
    return QUANTISED["disguised"](copy.deepcopy(layer))


def test_a_write_that_did_not_happen_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    inject(model, CONFIG)
    randomise(model)
    before = model(IMAGES)
    weight: Any = model.blocks[1].attn.qkv._parameters["weight"]  # type: ignore[index, union-attr, union-attr]
    real = Tensor.copy_

    def forgetful(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self if self is weight else real(self, *args, **kwargs)

    monkeypatch.setattr(Tensor, "copy_", forgetful)
    with pytest.raises(RuntimeError, match=r"blocks\.1\.attn\.qkv: the weight was written and does not read back"):
        remove(model, merge=True)
    monkeypatch.undo()
    assert torch.equal(model(IMAGES), before)
