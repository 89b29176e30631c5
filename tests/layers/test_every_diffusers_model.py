"""Every model of diffusers computes as merged weights do: its named projections, and all its linear layers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from loca_vision import LoCAConfig, adapters, inject, remove
from loca_vision.layers.targets import Target, find_targets
from support import diffusers_zoo as zoo
from support.formulas import stir

pytestmark = pytest.mark.skipif(not diffusers.__version__.startswith(zoo.VERSION), reason="the zoo is that of another version")
every_model = pytest.mark.parametrize("name", zoo.CASES)
NAMED = ("q", "k", "v", "out", "fc1", "fc2", "proj_in", "proj_out")


def test_every_class_is_in_the_zoo_or_left_out_with_a_reason() -> None:
    assert zoo.exported() == {*zoo.CASES, *zoo.LEFT_OUT}
    assert not {*zoo.CASES} & {*zoo.LEFT_OUT}


@cache
def before(name: str) -> list[Tensor]:
    return zoo.answer(zoo.model(name), name)


@every_model
@pytest.mark.parametrize("which", ("named", "linear"))
def test_output_is_that_of_merged_weights(name: str, which: str) -> None:
    model, first = zoo.model(name), before(name)
    targets = find_targets(model, NAMED if which == "named" else ("linear",))
    parts = tuple(part for part in NAMED if any(target.part == part for target in targets)) if which == "named" else ("linear",)
    if not targets:
        pytest.skip(f"it has no {which} layer")
    inject(model, LoCAConfig(n_components=8, targets=parts))
    try:
        assert_equal(zoo.answer(model, name), first)
        stir(model)
        found = zoo.answer(model, name)
        deltas = {projection: update.delta().detach() for projection, update in adapters(model).items()}
    finally:
        remove(model)
    assert deltas.keys() == {target.name for target in targets}
    assert_equal(zoo.answer(model, name), first)
    with written(targets, deltas):
        wanted = zoo.answer(model, name)
    largest = max((one - other).abs().max() for one, other in zip(wanted, first, strict=True))
    assert largest > 1e-3
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() <= 1e-5 * max(1, theirs.abs().max())


class written:
    """The oracle: the weights, with the updates added to their rows, as long as it lasts."""

    def __init__(self, targets: list[Target], deltas: dict[str, Tensor]) -> None:
        self.targets, self.deltas = targets, deltas

    @torch.no_grad()
    def __enter__(self) -> None:
        self.kept = [(target.layer.weight, target.layer.weight.clone()) for target in self.targets]
        for target in self.targets:
            weight: Any = target.layer.weight
            rows = slice(None) if target.rows is None else target.rows
            weight[rows] += self.deltas[target.name].view(weight[rows].shape)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for weight, values in reversed(self.kept):
            weight.copy_(values)


def assert_equal(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


@every_model
def test_every_linear_layer_is_found(name: str) -> None:
    model = zoo.model(name)
    found = {id(target.layer) for target in find_targets(model)}
    missed = {path for path, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) not in found}
    assert not missed


def _in_attention(model: nn.Module) -> Iterator[tuple[str, str, Target]]:
    modules = dict(model.named_modules())
    for target in find_targets(model):
        owners = target.layer_path.split(".")[:-1]
        while owners and type(modules[".".join(owners)]).__module__.startswith("torch."):
            owners.pop()
        owner = ".".join(owners)
        cls = type(modules[owner]).__name__
        if "Att" in cls and target.linear:
            yield cls, target.layer_path[len(owner) + 1 if owner else 0 :], target
