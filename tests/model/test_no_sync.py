"""Nothing in a step of training makes the host wait for an accelerator."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

import loca_vision.functional.cosine_sum as module
from loca_vision import AlternatingSchedule
from loca_vision.functional.cosine_sum import cosine_sum
from support.formulas import KINDS, stir
from support.no_sync import HostWaits, no_sync
from support.subjects import INTERLEAVED, SUBJECTS, Subject, optimiser, same_keys
from support.tolerance import GRADIENTS, assert_all_near

CPU = torch.device("cpu")

WAITS = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "float": lambda x: float(x[0]),
    "int": lambda x: int(x[0]),
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "to the cpu": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "masked select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x + 1),
    "repeats": lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.int64)),
    "list to tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "one way of where": lambda x: torch.where(x > 0),
}
GOES_ON = {
    "index": lambda x: x[torch.zeros(3, dtype=torch.int64)],
    "three ways of where": lambda x: torch.where(x > 0, x, 0.0),
    "sizes": lambda x: len(x) + x.numel() + x.shape[0],
    "sort": lambda x: x.argsort(),
    "scatter": lambda x: x.index_add(0, torch.zeros(3, dtype=torch.int64), x),
    "dtype": lambda x: x.to(torch.float64),
    "clamp": lambda x: x.clamp_(0, 1),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_the_emulation_refuses_what_waits(wait) -> None:
    x = torch.randn(3)
    with pytest.raises(HostWaits), no_sync(CPU):
        wait(x)
    wait(x)


@pytest.mark.parametrize("work", GOES_ON.values(), ids=GOES_ON)
def test_the_emulation_lets_the_rest_be(work) -> None:
    x = torch.randn(3)
    with no_sync(CPU):
        work(x)


def test_the_emulation_looks_into_operators_and_backward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    coefficients, locations, cells = torch.randn(3, requires_grad=True), torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int64)
    arguments = (coefficients, locations, cells, (4, 5), 1.0, "central")
    with no_sync(CPU):
        update = cosine_sum(*arguments)
        update.sum().backward()
    monkeypatch.setattr(module, "coefficient_gradient", lambda z, settings: z[0, 0] * z[0, 0].sum().item())
    with pytest.raises(HostWaits), no_sync(CPU):
        cosine_sum(*arguments).sum().backward()


STEPS = [(name, kind) for name in SUBJECTS for kind in KINDS if kind != "selora dora"]
STEPS += [("interleaved", kind) for kind in ("loca", "lora")]


@pytest.mark.parametrize(("name", "kind"), STEPS)
def test_no_step_of_training_waits(name: str, kind: str, accelerator: torch.device) -> None:
    """In each phase of a schedule, with and without autocast; the first steps make what is kept."""
    subject, makes = (SUBJECTS | {"interleaved": INTERLEAVED})[name], [{"fused": True}]
    if accelerator.type != "cpu":  # it reads the number of steps, which is on the CPU everywhere: emulated, that seems a wait
        makes.append({"foreach": True})
    for settings in makes:
        model = subject.adapted(kind, accelerator).train()
        schedule, adam = AlternatingSchedule(model, coefficient_steps=1, location_steps=1), optimiser(model, **settings)
        for watched in (nullcontext, partial(no_sync, accelerator)):
            for autocast in (False, False, True, True):
                with watched():
                    _step(subject, model, adam, schedule, autocast)
        assert all(bool(p.isfinite().all()) for p in model.parameters())


def _step(
    subject: Subject, model: nn.Module, adam: torch.optim.Optimizer, schedule: AlternatingSchedule, autocast: bool
) -> None:
    with torch.autocast(next(model.parameters()).device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = subject.loss(model)
    loss.backward()
    adam.step()
    schedule.step()
    adam.zero_grad()


@pytest.mark.filterwarnings("ignore")  # of torch's, about the streams of gradients
@pytest.mark.parametrize("moving", ("coefficients", "locations"))
def test_a_step_can_be_captured(moving: str, accelerator: torch.device) -> None:
    """Forward and backward pass as one CUDA graph, which reads what is learned wherever an optimiser has left it."""
    if accelerator.type != "cuda":
        pytest.skip("CUDA graphs need CUDA: LOCA_TEST_DEVICE=cuda")
    subject = SUBJECTS["vit"]
    model = subject.adapted("loca", accelerator).train()
    AlternatingSchedule(model, coefficient_steps=int(moving == "coefficients"), location_steps=1)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            subject.gradients(model)
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        subject.loss(model).backward()
    for seed in (4, 5):
        with torch.no_grad():
            stir(model, seed=seed)
        graph.replay()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        wanted = subject.gradients(copy.deepcopy(model))
        assert_all_near(*same_keys((found, wanted)), GRADIENTS)
