"""Optimisers that continue from a checkpoint with the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loca_vision.recipes.training.optimizer_state import optimizer_tensors, restore_optimizer
from loca_vision.storage.run_checkpoint import read_checkpoint, write_checkpoint

Make = Callable[[Any], torch.optim.Optimizer]
KINDS: dict[str, Make] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, betas=(0.8, 0.9)),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True, momentum=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "rate as a tensor": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1)),
}


class Odd(torch.optim.Optimizer):
    """State that torch would cast to the parameter's dtype, and numbers, None, infinity, lists and tables."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "limit": float("inf"), "pair": (1, [2.5, None])})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["sum"] = state.get("sum", 0.0) + parameter.grad.double()
                    state["count"] = state.get("count", 0) + 1
                    state["bits"] = torch.tensor([state["count"]], dtype=torch.uint8)
                    state["best"], state["note"] = -float("inf"), None
                    state["more"] = {"last": [parameter.grad.double()], 3: "x"}
                    parameter.data -= group["lr"] * (state["sum"] * state["count"]).to(parameter.dtype)


KINDS["Odd"] = Odd


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 2)).to(dtype)


def groups(net: nn.Module) -> list[dict[str, Any]]:
    first, *rest = net.parameters()
    return [{"params": [first], "lr": 0.05, "name": "first"}, {"params": rest, "name": "rest"}]


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """As the schedule does it, with parameters that rest, some of them from the start."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(3, 4, generator=generator).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        net(images).square().sum().backward()
        parameters = list(net.parameters())
        parameters[-1].grad = None
        if step % 2:
            parameters[1].grad = None
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return type(one) is type(other) and one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_restored_optimiser_goes_on_with_the_same_bits(steps: int, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    net = model(dtype)
    optimizer = KINDS[kind](groups(net))
    train(net, optimizer, range(steps))
    tensors, state = optimizer_tensors(optimizer)
    path = write_checkpoint(tmp_path, steps, tensors | {"other": torch.zeros(1)}, {"optimizer": state})
    twin = copy.deepcopy(net)
    train(net, optimizer, range(steps, steps + 4))

    found, states = read_checkpoint(path)
    kept = {name: tensor.clone() for name, tensor in found.items()}
    restored = KINDS[kind](groups(twin))
    restore_optimizer(restored, found, states["optimizer"])
    assert same(dict(restored.state_dict()["state"]), _state_at(kind, dtype, steps))
    train(twin, restored, range(steps, steps + 4))
    assert all(map(torch.equal, net.parameters(), twin.parameters()))
    assert same(restored.state_dict(), optimizer.state_dict())
    assert same(kept, found), "the optimiser works in the tensors it was given"


def _state_at(kind: str, dtype: torch.dtype, steps: int) -> Any:
    net = model(dtype)
    optimizer = KINDS[kind](groups(net))
    train(net, optimizer, range(steps))
    return dict(optimizer.state_dict()["state"])


def test_a_parameter_without_state_has_none_afterwards() -> None:
    net = model()
    optimizer = KINDS["AdamW"](groups(net))
    train(net, optimizer, range(2))
    restored = KINDS["AdamW"](groups(model()))
    restore_optimizer(restored, *optimizer_tensors(optimizer))
    assert sorted(restored.state_dict()["state"]) == sorted(optimizer.state_dict()["state"]) == [0, 1, 2, 3]


def test_through_accelerate() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = model()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(KINDS["AdamW"](groups(net)))
    train(net, prepared, range(3))
    saved = optimizer_tensors(prepared)
    assert saved[1]["kind"] == "AdamW"
    other = accelerator.prepare(KINDS["AdamW"](groups(model())))
    restore_optimizer(other, *saved)
    assert same(other.state_dict(), prepared.state_dict())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda n: KINDS["momentum"](groups(n)), "the checkpoint has AdamW, here it is SGD"),
        (lambda n: KINDS["AdamW"](n.parameters()), "2 groups of parameters in the checkpoint, 1 here"),
        (
            lambda n: KINDS["AdamW"]([groups(n)[0], groups(n)[1] | {"params": n[2].weight}]),
            "group 1 has 4 parameters .*, 1 here",
        ),
        (lambda n: KINDS["AdamW"](groups(n.bfloat16())), "is float32 6x4 in the checkpoint, bfloat16 6x4 here"),
        (
            lambda n: KINDS["AdamW"](groups(nn.Sequential(nn.Linear(4, 7), *n[1:]))),
            "float32 6x4 in the checkpoint, float32 7x4",
        ),
        (lambda n: KINDS["AdamW"]([g | {"name": "x"} for g in groups(n)]), "group 0 is 'first' in the checkpoint, 'x' here"),
    ],
)
def test_another_structure_is_refused_before_anything_is_touched(change: Make, sentence: str) -> None:
    net = model()
    optimizer = KINDS["AdamW"](groups(net))
    train(net, optimizer, range(2))
    other = change(model())
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=sentence):
        restore_optimizer(other, *optimizer_tensors(optimizer))
    assert same(other.state_dict(), before)


def _saved() -> tuple[dict[str, Tensor], dict[str, Any]]:
    net = model()
    optimizer = KINDS["AdamW"](groups(net))
    train(net, optimizer, range(2))
    return optimizer_tensors(optimizer)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t, s: t.pop("optimizer.0.exp_avg"),
        lambda t, s: t.update({"optimizer.9.exp_avg": torch.zeros(1)}),
        lambda t, s: s.pop("groups"),
        lambda t, s: s.pop("shapes"),
        lambda t, s: s.update(groups=3),
        lambda t, s: s.update(state={"x": {"table": []}}),
        lambda t, s: s.update(state=[]),
        lambda t, s: s["state"].update({"77": {"table": []}}),
        lambda t, s: s["state"].update({"4": 3}),
        lambda t, s: s["state"].update({"4": {"pickle": 3}}),
        lambda t, s: s["state"].update({"4": {"table": [3]}}),
        lambda t, s: s["state"].update({"4": {"tensor": "optimizer.0.exp_avg"}}),
        lambda t, s: s["state"].update({"4": {"a": 1, "b": 2}}),
        lambda t, s: s["groups"].append(s["groups"][0]),
        lambda t, s: s["groups"].__setitem__(0, {"table": []}),
        lambda t, s: s["groups"].__setitem__(0, {"table": [["params", [2]]]}),
        lambda t, s: s["groups"].__setitem__(0, {"table": [["params", ["x"]]]}),
    ],
)
def test_states_that_are_none(spoil: Callable[[Any, Any], object]) -> None:
    tensors, state = _saved()
    spoil(tensors, state)
    optimizer = KINDS["AdamW"](groups(model()))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"optimizer|could not|unpack|invalid literal"):
        restore_optimizer(optimizer, tensors, state)
    assert same(optimizer.state_dict(), before)


def test_a_state_that_is_neither_tensor_nor_json_is_refused() -> None:
    optimizer = torch.optim.SGD(model().parameters(), lr=0.1)
    optimizer.param_groups[0]["odd"] = {1, 2}
    with pytest.raises(TypeError, match=r"optimizer\.group\.0\.odd: a set in an optimiser's state"):
        optimizer_tensors(optimizer)
