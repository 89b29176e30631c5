"""Two ways to compute a scenario of passes through an adapted model: with weights built one by one, and built together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from loca_vision import LoCAConfig, inject
from loca_vision.functional.cost_model import using
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.model.traversal import all_updates
from support.timm_models import batch, tiny

CONFIG = LoCAConfig(n_components=40, targets=("q", "v", "out", "fc1"))
Answer = list[Any]  # of losses and gradients
Scenario = Callable[[nn.Module, Tensor], Answer]


def adapted(config: AdapterConfig = CONFIG, family: str = "vit") -> nn.Module:
    model = tiny(family)
    inject(model, config)
    return filled(model, 5)


def filled(model: nn.Module, seed: int) -> nn.Module:
    """With an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for update in all_updates(model):
            for parameter in update.trainable():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device) * 0.1)
    return model


def assert_same(scenario: Scenario, device: torch.device, make: Callable[[], nn.Module] = adapted, family: str = "vit") -> None:
    answers = []
    for way in ("whole", "together"):
        with using(way):  # type: ignore[arg-type]
            model, x = make().to(device), batch(family).to(device)
            if isinstance(model, UNet2DConditionModel):
                answers.append(scenario(model, x))
            else:  # weights are built with others from the second pass on, once all have asked
                answers.append([step(model, x), scenario(model, x)])
    whole, together = (list(_flat(answer)) for answer in answers)
    assert len(whole) == len(together) > 1
    for one, other in zip(whole, together, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * max(1e-3, float(one.abs().max())) * _room(one))


def _room(like: Tensor) -> float:
    return 1.0 if like.device.type == "cpu" else 20.0


def _flat(answer: Any) -> Iterator[Tensor | None]:
    if isinstance(answer, (list, tuple)):
        for part in answer:
            yield from _flat(part)
    else:
        yield answer if answer is None else answer.detach().clone()


def features(model: Any, x: Tensor) -> Tensor:
    return model.forward_features(x)  # type: ignore[no-any-return]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return features(model, x).square().mean()


def numbers(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".loca." in name]


def gradients(model: nn.Module) -> Answer:
    """Those accumulated since the last call."""
    found = [parameter.grad for parameter in numbers(model)]
    model.zero_grad(set_to_none=True)
    return found


def step(model: nn.Module, x: Tensor) -> Answer:
    value = loss(model, x)
    if value.requires_grad:
        value.backward()
    return [value, gradients(model)]


def in_blocks(model: Any, x: Tensor, run: Callable[[int, nn.Module, Tensor], Tensor] | None = None) -> Tensor:
    y = model.patch_embed(x)
    for i, block in enumerate(model.blocks):
        y = block(y) if run is None else run(i, block, y)
    return y.square().mean()  # type: ignore[no-any-return]
