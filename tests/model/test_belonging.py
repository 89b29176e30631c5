"""What belongs to an adapter: everything that trains with it is in a parameter group, and in its file."""

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
    active_adapters,
    inject,
    load_adapter,
    parameter_groups,
    remove,
    save_adapter,
    set_adapters,
)
from loca_vision.storage.safetensors_file import open_safetensors
from support.adapter_files import IMAGES, tiny

CONFIG = LoCAConfig(n_components=20)
TARGETS = torch.tensor([0, 2])


def mlp() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 5))


def own_head(model: Any) -> None:
    model.head = mlp()


def more_classes(model: Any) -> None:
    model.reset_classifier(5)


def unfrozen_norm(model: Any) -> None:
    model.norm.requires_grad_(True)


def prompt(model: Any) -> None:
    model.register_parameter("prompt", nn.Parameter(torch.zeros(1, 1, 48)))
    model.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] + model.prompt,))


LATER: dict[str, Callable[[Any], None]] = {
    "an own head": own_head,
    "a head for other classes": more_classes,
    "what was unfrozen": unfrozen_norm,
    "a new parameter": prompt,
}


def train(model: nn.Module) -> None:
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.5, head_lr=0.5))
    F.cross_entropy(model(IMAGES), TARGETS).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("second", [False, True], ids=["alone", "before a second adapter"])
@pytest.mark.parametrize("later", LATER)
def test_what_becomes_trainable_later_is_trained_and_saved(later: str, second: bool, tmp_path: Path) -> None:
    model = tiny()
    inject(model, CONFIG, "a")
    LATER[later](model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad and ".loca." not in name}
    train(model)
    assert all(not torch.equal(model.get_parameter(name), value) for name, value in before.items())
    trained = model(IMAGES)
    if second:
        inject(model, CONFIG, "b")
        set_adapters(model, "a")
    file = save_adapter(model, tmp_path, "a")
    with open_safetensors(file) as opened:
        assert {key[5:] for key in opened.entries if key.startswith("full.")} == set(before)
    twin = tiny()
    LATER[later](twin)
    load_adapter(twin, tmp_path)
    torch.testing.assert_close(twin(IMAGES), trained)


@pytest.mark.parametrize("change", [own_head, more_classes, lambda model: model.reset_classifier(0)])
@pytest.mark.parametrize("merge", [True, False])
def test_removing_after_the_head_was_exchanged(change: Callable[[Any], None], merge: bool) -> None:
    model: Any = tiny()
    inject(model, CONFIG)
    train(model)
    change(model)
    adapted, head = model(IMAGES), {name: value.clone() for name, value in model.head.state_dict().items()}
    remove(model, merge=merge)
    assert active_adapters(model) == {} and not any("loca" in name for name, _ in model.named_modules())
    if merge:
        torch.testing.assert_close(model(IMAGES), adapted)
    found = model.head.state_dict()
    assert all(torch.equal(found[name], value) for name, value in head.items())


@pytest.mark.parametrize("between", [[], "a", "b"])
def test_switching_between_forward_and_backward(between: Any) -> None:
    """The gradients are those of the adapters that acted in the forward pass, as if nothing had been switched."""
    model, other = (two_adapters() for _ in range(2))
    loss, expected = (F.cross_entropy(m(IMAGES), TARGETS) for m in (model, other))
    set_adapters(model, between)
    with torch.no_grad():
        reference = model(IMAGES)
    if between != "b":
        assert not torch.allclose(reference, other(IMAGES))
    loss.backward()
    expected.backward()
    set_adapters(model, "b")
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name


def two_adapters() -> nn.Module:
    model = tiny()
    for name in ("a", "b"):
        torch.manual_seed(ord(name))
        inject(model, CONFIG, name)
        for _ in range(3):
            train(model)
    set_adapters(model, "b")
    return model


def test_an_optimiser_made_before_the_adapter_still_trains_the_head() -> None:
    model: Any = tiny()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=1.0)
    inject(model, CONFIG)
    before = model.head.weight.detach().clone()
    model(IMAGES).sum().backward()
    optimizer.step()
    assert not torch.equal(model.head.weight, before)
    first = model.head.weight
    remove(model)
    assert model.head.weight is first and torch.equal(first, tiny().get_parameter("head.weight"))


def test_tied_parameters_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body: Any = tiny()
            self.second = nn.Linear(48, 3)
            self.second.weight = self.body.head.weight

    model = Tied()
    for name in ("a", "b"):
        inject(model, CONFIG, name)
        assert model.second.weight is model.body.head.weight
    set_adapters(model, [])
    assert model.second.weight is model.body.head.weight
    remove(model)
    assert model.second.weight is model.body.head.weight
