"""Training a compiled model: one graph forward and one backward for each phase of the schedule, and none after that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loca_vision import AlternatingSchedule, inject, set_adapters
from support.formulas import stir
from support.subjects import SUBJECTS, optimiser, same_keys
from support.tolerance import GRADIENTS, STEPS, assert_all_near, assert_near

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler's own making
VIT, UNET = SUBJECTS["vit"], SUBJECTS["unet"]
PHASES = 2  # of which each has a graph
Compiler = Callable[[nn.Module], Any]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiler() -> Compiler:
    """Forward and backward graphs of the whole model, run as they are: what can go wrong without a GPU."""
    return partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture
def fastest(accelerator: torch.device) -> Compiler:
    """Kernels of inductor's in CUDA graphs."""
    if accelerator.type != "cuda":
        pytest.skip("CUDA graphs need CUDA: LOCA_TEST_DEVICE=cuda")
    return partial(torch.compile, fullgraph=True, backend="inductor", mode="reduce-overhead")


def one_block(device: torch.device) -> nn.Module:
    """The first block of the vision transformer, which has all that is to be compiled, adapted."""
    model = VIT.make()
    model.blocks = model.blocks[:1]
    inject(model.to(device), replace(VIT.config("loca"), targets=("q", "v", "fc1")))
    return stir(model).train()


def _new_step() -> None:
    """What an earlier step returned may be written over by a CUDA graph."""
    if torch.cuda.is_available():
        torch.compiler.cudagraph_mark_step_begin()


def alternating(model: nn.Module) -> AlternatingSchedule:
    return AlternatingSchedule(model, coefficient_steps=1, location_steps=1, learning_steps=None)


@contextmanager
def settled(step: int) -> Iterator[None]:
    """After every phase was seen once, nothing may be compiled any more."""
    with torch.compiler.set_stance("default" if step < PHASES else "fail_on_recompile"):
        yield


def gradients(model: nn.Module, run: Any) -> dict[str, Tensor]:
    """By the names of the plain model, through the compiled one."""
    model.zero_grad()
    loss = VIT.loss(run)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model: nn.Module, compiled: Any) -> None:
    schedule = alternating(model)
    seen = []
    for step in range(3 * PHASES):
        wanted = gradients(model, model)
        with settled(step):
            _new_step()
            found = gradients(model, compiled)
        moving = {name.rpartition(".")[2] for name in found if ".loca." in name}
        assert moving == {schedule.phase}
        assert_all_near(*same_keys((found, wanted)), GRADIENTS)
        seen.append(schedule.phase)
        schedule.step()
    assert seen == ["coefficients", "locations"] * 3


def assert_same_training(model: nn.Module, compile_it: Compiler) -> None:
    """The losses of a few steps; and what the plain model kept for inference follows, though no plain step was made."""
    twin, found = copy.deepcopy(model), []
    compiled = compile_it(model)
    before = VIT.output(model)
    for trained, run in ((model, compiled), (twin, twin)):
        adam, schedule, losses = optimiser(trained, fused=True), alternating(trained), []
        for step in range(2 * PHASES):
            with settled(step):
                _new_step()
                loss = VIT.loss(run)
                loss.backward()
            losses.append(loss.detach().clone())
            adam.step()
            schedule.step()
            adam.zero_grad()
        found.append(torch.stack(losses))
    assert_near(*found, STEPS)
    assert float((VIT.output(model) - before).abs().max()) > 1e-3
    assert_near(VIT.output(model), VIT.output(twin), STEPS)


def test_gradients_in_both_phases(accelerator: torch.device, compiler: Compiler) -> None:
    model = one_block(accelerator)
    assert_same_gradients(model, compiler(model))


def test_training(accelerator: torch.device, compiler: Compiler) -> None:
    assert_same_training(one_block(accelerator), compiler)


def test_gradients_by_the_fastest_kernels(accelerator: torch.device, fastest: Compiler) -> None:
    model = one_block(accelerator)
    assert_same_gradients(model, fastest(model))


def test_training_by_the_fastest_kernels(accelerator: torch.device, fastest: Compiler) -> None:
    assert_same_training(one_block(accelerator), fastest)


@pytest.mark.parametrize("kind", ("loca", "fourierft", "lora"))
def test_inference_by_the_fastest_kernels(kind: str, accelerator: torch.device, fastest: Compiler) -> None:
    """Other strengths compile nothing anew."""
    model = UNET.adapted(kind, accelerator).requires_grad_(False)
    compiled = fastest(model)
    for step, strength in enumerate((1.0, 0.5, -0.5, 2.0)):
        set_adapters(model, "default", strength)
        wanted = UNET.output(copy.deepcopy(model))
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            _new_step()
            assert_near(UNET.output(compiled).clone(), wanted, GRADIENTS)
