"""The contenders of a GPU run: the floor, LoCA each way, this library's and peft's LoRA and FourierFT; some also compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from contenders import FLOOR, LOCA, LOCATIONS, Method, methods, peft_lora
from loca_vision.functional import cost_model
from loca_vision.functional.cost_model import Strategy
from steps import Step
from workloads import Job, Workload

WAYS: tuple[Strategy, ...] = ("whole",)  # in addition to the chosen one
Made = Callable[[Workload], Step]


class Forced(Step):
    """A step in which every update is computed by one strategy."""

    def __init__(self, model: nn.Module, work: Workload, way: Strategy) -> None:
        super().__init__(model, work)
        self.way = way

    def gradients(self) -> Tensor:
        with cost_model.using(self.way):
            return super().gradients()


def eager(job: Job) -> dict[str, Made]:
    """Return contenders by name, the most informative first. LoCA uses the cost model unless its name contains a forced way."""
    known = methods(job)
    found: dict[str, Made] = {}
    for name in (FLOOR, LOCA, peft_lora(job), LOCATIONS):
        found[name] = partial(_plain, adapt=known[name])
    for way in WAYS:
        found |= {f"{name}, {way}": partial(_forced, adapt=known[name], way=way) for name in (LOCA, LOCATIONS)}
    fourier = f"FourierFT n={job.n_components}"
    return found | {name: partial(_plain, adapt=known[name]) for name in (f"LoRA r={job.rank}", fourier, f"{fourier}, peft")}


def compiled(job: Job, *, backend: str) -> dict[str, Made]:
    """Return contenders that use torch.compile, which compiles during the first step."""
    known = methods(job)
    return {name: partial(_compiled, adapt=known[name], backend=backend) for name in (FLOOR, LOCA, peft_lora(job))}


def _plain(work: Workload, adapt: Method) -> Step:
    return Step(adapt(work), work)


def _forced(work: Workload, adapt: Method, way: Strategy) -> Step:
    return Forced(adapt(work), work, way)


def _compiled(work: Workload, adapt: Method, backend: str) -> Step:
    model = adapt(work)
    step = Step(model, work)
    step.model = torch.compile(model, backend=backend)  # type: ignore[assignment]
    return step
