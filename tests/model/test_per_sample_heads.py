"""Tensors that adapters train as a whole, in batches that mix them: heads, norms, statistics, and what cannot be mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loca_vision import (
    LoCAConfig,
    LoRAConfig,
    adapters,
    head_logits,
    inject,
    load_adapter,
    per_sample,
    save_adapter,
    set_adapters,
)
from support.mixed import one_by_one, stir
from support.timm_models import tiny

CONFIGS = {"a": LoCAConfig(n_components=20), "b": LoRAConfig(r=2)}


def with_heads(model: Any, **modules: tuple[str, ...]) -> Any:
    """Adapters a and b, each with a head of its own, and other tensors it trains as a whole."""
    for name, config in CONFIGS.items():
        inject(model, config, name, modules_to_save=modules.get(name, ()))
        stir(model, name)
        for parameter in (p for p in model.parameters() if p.requires_grad and p.dim() < 3):
            if not any(parameter is own for n in adapters(model, name).values() for own in n.parameters()):
                nn.init.normal_(parameter, 1.0, 0.2)
    return model


def test_heads_learn_from_their_own_samples() -> None:
    model, x, entries = with_heads(tiny("vit").train()), torch.randn(4, 3, 32, 32), ["a", None, "b", "b"]
    heads = {}
    for name in CONFIGS:
        set_adapters(model, name)
        heads[name] = model.head.weight
    assert heads["a"] is not heads["b"]
    with per_sample(model, entries):
        found = model(x)
    mine = torch.autograd.grad(found.square().sum(), list(heads.values()))
    wanted = one_by_one(model, x, entries)
    theirs = torch.autograd.grad(wanted.square().sum(), list(heads.values()))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_head_of_several_is_that_of_the_last_one_named() -> None:
    model, x = with_heads(tiny("vit").eval()), torch.randn(2, 3, 32, 32)
    entries = [{"a": 1.0, "b": 0.0}, {"b": 0.0, "a": 1.0}]
    with per_sample(model, entries):
        found = model(x)
    torch.testing.assert_close(found, one_by_one(model, x, entries))


@torch.no_grad()
def test_norms_that_were_trained_follow_the_sample() -> None:
    model = with_heads(tiny("vit").eval(), a=("norm", "blocks.1.norm1"), b=("blocks.0.norm2",))
    x, entries = torch.randn(3, 3, 32, 32), ["a", "b", None]
    wanted = one_by_one(model, x, entries)
    set_adapters(model, "a")
    with per_sample(model, entries):
        torch.testing.assert_close(model(x), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_statistics_that_were_trained_follow_the_sample_and_do_not_train_in_a_mixed_batch() -> None:
    model = tiny("mobilevit").train()
    x, entries = torch.randn(3, 3, 64, 64), ["a", None, "b"]
    for name, config in CONFIGS.items():
        inject(model, config, name)
        model(torch.randn(4, 3, 64, 64) * (2.0 if name == "a" else 0.5))
    model.eval()
    wanted = one_by_one(model, x, entries)
    with per_sample(model, entries):
        torch.testing.assert_close(model(x), wanted, atol=1e-4, rtol=1e-4)
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="batch normalisation trains, which mixes the samples"), per_sample(model, entries):
        model(x)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "tracked" not in key)


def other_heads(tmp_path: Any) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A model with two adapters whose heads have 5 and 7 classes, images, and what each adapter answers alone."""
    answers, x = {}, torch.randn(4, 3, 32, 32)
    for name, classes in (("a", 5), ("b", 7)):
        torch.manual_seed(0)
        own: Any = tiny("vit").eval()
        own.reset_classifier(classes)
        inject(own, CONFIGS[name])
        stir(own, "default")
        save_adapter(own, tmp_path / f"{name}.safetensors")
        with torch.no_grad():
            answers[name] = own(x)
    torch.manual_seed(0)
    model: Any = tiny("vit").eval()
    for name in "ab":
        load_adapter(model, tmp_path / f"{name}.safetensors", name)
    return model, x, answers


@torch.no_grad()
def test_heads_of_different_sizes(tmp_path: Any) -> None:
    model, x, answers = other_heads(tmp_path)
    names = ["a", "b", "a", None]
    with per_sample(model, names):
        with pytest.raises(ValueError, match=r"different sizes \(3, 5, 7\).*forward_features.*head_logits"):
            model(x)
        features = model.forward_features(x)
    found = head_logits(model, features, names)
    assert [len(own) for own in found] == [5, 7, 5, 3]
    for sample, name in enumerate(names[:3]):
        torch.testing.assert_close(found[sample], answers[str(name)][sample], atol=1e-5, rtol=1e-5)
    with per_sample(model, ["a"] * 4):
        torch.testing.assert_close(model(x), answers["a"], atol=1e-5, rtol=1e-5)


def test_head_logits_has_gradients_and_refuses_what_does_not_fit(tmp_path: Any) -> None:
    model, _, _ = other_heads(tmp_path)
    features = torch.randn(2, 17, 48, requires_grad=True)
    found = head_logits(model, features, ["a", "b"])
    sum(own.sum() for own in found).backward()  # type: ignore[union-attr]
    assert features.grad is not None and (features.grad[:, 0] != 0).any()
    with pytest.raises(ValueError, match="names has 3 entries for features of 2 samples"):
        head_logits(model, features, ["a", "b", None])
    with pytest.raises(TypeError, match="expected a timm model"):
        head_logits(nn.Linear(2, 2), features, ["a", "b"])


def test_a_tensor_of_the_model_itself_cannot_be_mixed() -> None:
    model = with_heads(tiny("vit").eval(), a=("pos_embed",))
    sentence = "pos_embed is trained as a whole, and per_sample cannot give each sample its own"
    with pytest.raises(ValueError, match=sentence), per_sample(model, ["a", "b"]):
        pytest.fail("entered")


@torch.no_grad()
def test_forward_features_is_tried_too() -> None:
    model = tiny("swinv2_cr").eval()
    for name in "ab":
        inject(model, LoRAConfig(r=1, targets=("fc1",)), name)
        stir(model, name)
    with per_sample(model, ["a", "b"] * 2), pytest.raises(ValueError, match="its updates cannot differ"):
        model.forward_features(torch.randn(4, 3, 32, 32))
