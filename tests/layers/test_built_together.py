"""Weights that are built together, against those that are built one by one: the same losses, the same gradients."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from loca_vision import (
    AlternatingSchedule,
    LoCAConfig,
    LoRAConfig,
    SDCTFTConfig,
    adapters,
    inject,
    parameter_groups,
    remove,
    set_adapters,
)
from loca_vision.functional.cost_model import using
from loca_vision.layers import built_together
from loca_vision.layers.built_together import BuiltTogether
from loca_vision.methods.adapter_config import AdapterConfig
from support import pipelines
from support.timm_models import batch
from support.two_ways import (
    CONFIG,
    Answer,
    Scenario,
    adapted,
    assert_same,
    filled,
    gradients,
    in_blocks,
    loss,
    numbers,
    step,
)

pytestmark = pytest.mark.usefixtures("one_by_one")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each weight that was asked for was built together with others."""
    found: list[bool] = []
    take = BuiltTogether.take

    def watched(self: BuiltTogether, *asked: Any) -> Any:
        one = take(self, *asked)
        found.append(one is not None)
        return one

    monkeypatch.setattr(BuiltTogether, "take", watched)
    return found


# passes -----------------------------------------------------------------------------------------------------------------------


def two_forwards(model: nn.Module, x: Tensor) -> Answer:
    first, second = loss(model, x), loss(model, x[:1])
    second.backward()
    apart = gradients(model)
    first.backward()
    loss(model, x[1:]).backward()
    return [first, second, apart, gradients(model)]


def two_backwards(model: nn.Module, x: Tensor) -> Answer:
    value = loss(model, x)
    value.backward(retain_graph=True)
    some = torch.autograd.grad(value, numbers(model)[::3], retain_graph=True)
    value.backward()
    return [some, gradients(model)]


def a_layer_twice(model: Any, x: Tensor) -> Answer:
    first, second = model.blocks
    value = first(second(first(model.patch_embed(x)))).square().mean()
    value.backward()
    return [value, gradients(model), step(model, x)]


def layers_skipped(model: nn.Module, x: Tensor) -> Answer:
    generator, found = torch.Generator().manual_seed(3), []
    optimizer = torch.optim.SGD(numbers(model), lr=0.1, momentum=0.9)
    for number in range(8):
        value = in_blocks(model, x, lambda _, block, y: block(y) if torch.rand((), generator=generator) < 0.5 else y)
        if value.requires_grad and number % 3:
            value.backward()
        found.append(value)
        if number % 2:
            optimizer.step()
            found.append(gradients(model))
    return found


def an_error_and_another_try(model: Any, x: Tensor) -> Answer:
    def fail(*_: Any) -> None:
        raise KeyError

    hook = model.blocks[1].mlp.register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(KeyError):
            loss(model, x)
    hook.remove()
    return [step(model, x), step(model, x)]


def autocast_now_and_then(model: nn.Module, x: Tensor) -> Answer:
    found = []
    for number in range(4):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=number % 2 == 1):
            answer = step(model, x)
        found.append(answer if number % 2 == 0 else None)
    return found


def precisions(model: nn.Module, x: Tensor) -> Answer:
    found = []
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        answer = step(model.to(dtype), x.to(dtype))
        found.append(answer if dtype != torch.bfloat16 else None)
    return found


PASSES = [
    two_forwards,
    two_backwards,
    a_layer_twice,
    layers_skipped,
    an_error_and_another_try,
    autocast_now_and_then,
    precisions,
]


@pytest.mark.parametrize("scenario", PASSES, ids=lambda scenario: scenario.__name__)
def test_passes(scenario: Scenario, taken: list[bool], device: torch.device) -> None:
    assert_same(scenario, device)
    assert taken and all(taken)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("which", [{0, 1}, {0}, {1}, set()], ids=["all", "first", "second", "nested"])
def test_checkpoints(which: set[int], reentrant: bool, device: torch.device) -> None:
    def again(run: Callable[..., Tensor], y: Tensor) -> Tensor:
        return checkpoint(run, y, use_reentrant=reentrant)  # type: ignore[no-any-return]

    def once(model: Any, x: Tensor) -> Answer:
        def both(y: Tensor) -> Tensor:
            for block in model.blocks:
                y = again(block, y)
            return y

        y = model.patch_embed(x).detach().requires_grad_()
        for i, block in enumerate(model.blocks):
            y = again(block, y) if i in which else block(y) if which else y
        value = (y if which else again(both, y)).square().mean()
        value.backward()
        return [value, gradients(model)]

    assert_same(lambda model, x: [once(model, x), once(model, x)], device)


# changes in the middle --------------------------------------------------------------------------------------------------------


def base_written(model: Any) -> None:
    for linear in model.blocks[1].modules():
        if isinstance(linear, nn.Linear):
            linear._parameters["weight"].mul_(1.5)  # type: ignore[union-attr]


def locations_frozen(model: nn.Module) -> None:
    for spectrum in adapters(model).values():
        spectrum.locations.requires_grad_(False)


def one_frozen(model: nn.Module) -> None:
    adapters(model)["blocks.1.attn.q"].coefficients.requires_grad_(False)


def moved(model: Any) -> None:
    """What an address and a version cannot tell."""
    for linear in model.blocks[1].modules():
        if isinstance(linear, nn.Linear):
            linear._parameters["weight"].data.mul_(1.5)  # type: ignore[union-attr]
    model.float()


def weaker(model: nn.Module) -> None:
    set_adapters(model, "default", 0.5)


def taken_out(model: nn.Module) -> None:
    set_adapters(model, [])


CHANGES = [base_written, locations_frozen, one_frozen, moved, weaker, taken_out]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_two_layers(change: Callable[[nn.Module], None], device: torch.device) -> None:
    def scenario(model: nn.Module, x: Tensor) -> Answer:
        def run(i: int, block: nn.Module, y: Tensor) -> Tensor:
            if i == 1:
                with torch.no_grad():
                    change(model)
            return block(y)  # type: ignore[no-any-return]

        value = in_blocks(model, x, run)
        value.backward()
        return [value, gradients(model), step(model, x)]

    assert_same(scenario, device)


def test_locations_written_past_their_version_while_they_rest() -> None:
    def scenario(model: nn.Module, x: Tensor) -> Answer:
        locations_frozen(model)
        first = step(model, x)
        for spectrum in adapters(model).values():
            spectrum.locations.data.copy_(1 - spectrum.locations)
        return [first, step(model, x)]

    assert_same(scenario, torch.device("cpu"))


def test_a_gradient_is_that_of_the_values_that_were_used(device: torch.device) -> None:
    x = batch("vit").to(device)
    with using("together"):
        model = adapted().to(device)
        wanted = step(model, x)
        value = loss(model, x)
        with torch.no_grad():
            for number in numbers(model):
                number.add_(0.1).clamp_(0, 1)
        value.backward()
    for found, right in zip(gradients(model), wanted[1], strict=True):
        torch.testing.assert_close(found, right)


def test_removal_before_the_backward_pass(device: torch.device) -> None:
    def scenario(model: nn.Module, x: Tensor) -> Answer:
        own, value = numbers(model), loss(model, x)
        remove(model)
        value.backward()
        found: Answer = [value, [number.grad for number in own]]
        inject(model, CONFIG)
        return [found, step(filled(model, 8), x)]

    assert_same(scenario, device)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_in_the_middle_of_a_pass(clone: Callable[[nn.Module], nn.Module], device: torch.device) -> None:
    def scenario(model: Any, x: Tensor) -> Answer:
        y = model.blocks[0](model.patch_embed(x))
        twin: Any = clone(model)
        values = [twin.blocks[1](y).square().mean(), model.blocks[1](y).square().mean()]
        values[1].backward(retain_graph=True)
        mine = gradients(model)
        values[0].backward()
        return [values, mine, gradients(model), gradients(twin), step(twin, x)]

    assert_same(scenario, device)


# adapters, models and training ------------------------------------------------------------------------------------------------

CONFIGS: dict[str, AdapterConfig] = {
    "one component": LoCAConfig(n_components=1),
    "other counts": LoCAConfig(n_components={"*.q": 3, "blocks.0.attn.v": 1, "*": 200}, targets=("q", "k", "v", "fc1")),
    "all cells": LoCAConfig(n_components=48 * 48, targets=("q", "out")),
    "sdctft": SDCTFTConfig(n_components=20),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configurations(config: AdapterConfig, taken: list[bool], device: torch.device) -> None:
    assert_same(lambda model, x: [step(model, x), step(model, x)], device, lambda: adapted(config))
    assert taken and all(taken)


@pytest.mark.parametrize("size", [0, 2 * 4 * 48 * 48], ids=["each alone", "by two"])
def test_large_batches_are_built_in_portions(size: int, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    monkeypatch.setattr(built_together, "LARGEST_BATCH", size)
    assert_same(lambda model, x: [step(model, x), step(model, x)], device)


OTHERS: dict[str, AdapterConfig] = {
    "of the same kind": LoCAConfig(n_components=40, targets=CONFIG.targets, seed=3),
    "of another size": LoCAConfig(n_components=17, targets=("q", "k", "fc1"), seed=3),
    "of low rank": LoRAConfig(r=2, targets=("q", "fc1")),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_two_adapters(other: AdapterConfig, device: torch.device) -> None:
    def scenario(model: nn.Module, x: Tensor) -> Answer:
        inject(model, other, "other")
        filled(model, 7)
        found = []
        for active, strengths in ((["default", "other"], [0.5, 2.0]), (["other"], [1.0]), (["other", "default"], [1.0, 1.0])):
            set_adapters(model, active, strengths)
            found.append(step(model, x))
        for update in adapters(model, "other").values():
            update.requires_grad_(False)
        return [*found, step(model, x)]

    assert_same(scenario, device)


@pytest.mark.parametrize("family", ["beit", "eva", "swinv2", "siglip", "maxvit", "eva02_separate"])
def test_families(family: str, taken: list[bool], device: torch.device) -> None:
    """With weights that are read past `forward`, of pools and windows, and with rows of a projection that lie apart."""
    make = lambda: adapted(LoCAConfig(n_components=20), family)  # noqa: E731
    assert_same(lambda model, x: [step(model, x), step(model, x)], device, make, family)
    assert any(taken) == (family != "maxvit")


@pytest.mark.parametrize("fused", [False, True], ids=["apart", "fused"])
def test_a_unet(fused: bool, taken: list[bool], device: torch.device) -> None:
    def make() -> nn.Module:
        model = pipelines.unet()
        inject(model, LoCAConfig(n_components=30))
        if fused:
            model.fuse_qkv_projections()
        return filled(model, 2)

    def scenario(model: nn.Module, _: Tensor) -> Answer:
        found = []
        inputs = {name: value.to(device) for name, value in pipelines.inputs_of(model).items()}
        for scale in (1.0, 0.5):
            value = model(**inputs, cross_attention_kwargs={"scale": scale}).sample.square().mean()
            value.backward()
            found += [value, gradients(model)]
        return found

    assert_same(scenario, device, make)
    assert taken and all(taken)


@pytest.mark.parametrize("steps", [(2, 1, 5, False), (0, 2, 4, False), (1, 1, None, False), (1, 1, 3, True)], ids=str)
def test_phases(steps: tuple[int, int, int | None, bool], device: torch.device) -> None:
    coefficients, locations, learning, at_once = steps

    def scenario(model: nn.Module, x: Tensor) -> Answer:
        optimizer = torch.optim.SGD(parameter_groups(model, lr=0.05, location_lr=0.001), momentum=0.9)
        schedule = AlternatingSchedule(
            model, coefficient_steps=coefficients, location_steps=locations, learning_steps=learning, together=at_once
        )
        found = []
        for _ in range(6):
            value = loss(model, x)
            value.backward()
            optimizer.step()
            schedule.step()
            found += [value, gradients(model)]
        return found

    assert_same(scenario, device)
