"""Two models, one of timm and one of diffusers, that tests run on any device: how to make, call and train them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loca_vision import AlternatingSchedule, inject, parameter_groups
from support import pipelines
from support.formulas import KINDS, stir
from support.timm_models import batch, tiny


@dataclass(frozen=True)
class Subject:
    """A tiny model and what is asked of it.

    Attributes:
        make: a fresh one on the CPU, the same at every call.
        targets: the projections that are adapted.
        inputs: of one call, on the CPU.
        checkpoint: turns gradient checkpointing on.
    """

    make: Callable[[], nn.Module]
    targets: tuple[str, ...]
    inputs: Callable[[], dict[str, Any]]
    checkpoint: Callable[[nn.Module], Any]

    def config(self, kind: str) -> Any:
        """The settings of a method for the projections that the model has."""
        return replace(KINDS[kind], targets=self.targets)

    def adapted(self, kind: str, device: torch.device | str = "cpu", name: str = "default") -> nn.Module:
        """On a device, with an adapter that shows."""
        model = self.make().to(device)
        inject(model, self.config(kind), name)
        return stir(model, name)

    def answer(self, model: nn.Module, **more: Any) -> Tensor:
        """The output, where the model is."""
        answer = model(**_given(self.inputs, next(model.parameters()).device), **more)
        return answer if isinstance(answer, Tensor) else answer[0]

    @torch.no_grad()
    def output(self, model: nn.Module, **more: Any) -> Tensor:
        """The output without gradients: inference."""
        return self.answer(model, **more)

    def loss(self, model: nn.Module) -> Tensor:
        """The distance of the output from fixed numbers."""
        answer = self.answer(model).float()
        wanted = torch.arange(answer.numel(), dtype=torch.float32, device=answer.device).cos().view_as(answer)
        return F.mse_loss(answer, wanted)

    def gradients(self, model: nn.Module) -> dict[str, Tensor]:
        """Of all that is trained, by name."""
        model.zero_grad()
        self.loss(model).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@cache
def _given(inputs: Callable[[], dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """Inputs on a device, where they stay, so that no step waits for them."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs().items()}


def _unet() -> nn.Module:
    return copy.deepcopy(_frozen_unet())


@cache
def _frozen_unet() -> nn.Module:
    """Self and cross attention in one block."""
    sizes = {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return pipelines.unet(**sizes, mid_block_type=None).requires_grad_(False)


def of_timm(family: str, targets: tuple[str, ...] = ("q", "v", "out", "fc1")) -> Subject:
    """A tiny model of a family of timm."""
    return Subject(partial(tiny, family), targets, partial(_images, family), lambda model: model.set_grad_checkpointing(True))


def _images(family: str) -> dict[str, Any]:
    return {"x": batch(family)}


SUBJECTS = {
    "vit": of_timm("vit"),
    "unet": Subject(
        _unet,
        ("q", "v", "out"),
        lambda: pipelines.inputs_of(_frozen_unet()) | {"return_dict": False},
        lambda model: model.enable_gradient_checkpointing(),
    ),
}
INTERLEAVED = of_timm("maxvit", ("q", "v", "out"))
"""Of whose fused weights a projection is not a range of rows, but an index."""


def optimiser(model: nn.Module, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameter_groups(model, lr=1e-2, location_lr=3e-3, weight_decay=1e-2), **settings)


def phases(model: nn.Module) -> AlternatingSchedule:
    """A step of coefficients, one of locations, and coefficients from there on."""
    return AlternatingSchedule(model, coefficient_steps=1, location_steps=1, learning_steps=2)


def losses(subject: Subject, model: nn.Module, steps: int, **settings: Any) -> Tensor:
    """The losses of some steps of training."""
    schedule, found = phases(model), []
    adam = optimiser(model, **settings)
    for _ in range(steps):
        loss = subject.loss(model)
        loss.backward()
        adam.step()
        schedule.step()
        adam.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def same_keys(values: Iterable[dict[str, Tensor]]) -> list[list[Tensor]]:
    """The values of dicts that have the same keys, in one order."""
    first, *others = values
    assert all(other.keys() == first.keys() for other in others)
    return [[value[key] for key in first] for value in (first, *others)]
