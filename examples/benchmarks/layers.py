"""The models timed along an axis: a linear layer, or a ViT block, adapted by each method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import peft
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from contenders import FLOOR, LOCA, LOCATIONS, methods
from loca_vision import LoRAConfig
from loca_vision.layers.adapted_linear import adapt
from loca_vision.layers.weight_updates import AdapterSlot
from loca_vision.methods.spectrum import random_spectrum
from loca_vision.methods.update import Update
from steps import Step
from workloads import Job, Workload

METHODS = (FLOOR, LOCA, LOCATIONS, "LoRA", "FourierFT, peft")


@dataclass(frozen=True)
class Point:
    """A projection's number of components, its inputs and outputs, and the number of vectors it sees."""

    components: int
    width: int
    tokens: int


def linear_layers(point: Point, rank: int, seed: int) -> dict[str, Callable[[], object]]:
    """Return forward and backward of one square layer, by method."""
    layers = {method: _layer(method, point, rank, seed) for method in METHODS}
    x, direction = torch.randn(point.tokens, point.width, requires_grad=True), torch.randn(point.tokens, point.width)
    return {method: partial(_step, layer, x, direction) for method, layer in layers.items()}


def _step(layer: nn.Module, x: Tensor, direction: Tensor) -> None:
    layer.zero_grad()
    x.grad = None
    layer(x).backward(direction)


def _layer(method: str, point: Point, rank: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layer: nn.Module = nn.Linear(point.width, point.width).requires_grad_(False)
    if method == "FourierFT, peft":
        config = peft.FourierFTConfig(n_frequency=point.components, scaling=300.0, init_weights=True, target_modules=["0"])
        adapted: nn.Module = peft.get_peft_model(nn.Sequential(layer), config)
        return adapted
    if method != "floor":
        updates = adapt(layer)
        updates.add(AdapterSlot("default", "layer", None), _update(method, point, rank, seed))
        updates.strengths["default"] = 1.0
    return layer


def _update(method: str, point: Point, rank: int, seed: int) -> Update:
    shape = (point.width, point.width)
    if method == "LoRA":
        update = LoRAConfig(r=min(rank, point.width)).build(shape)
        nn.init.normal_(update.down)
        return update
    spectrum = random_spectrum(shape, point.components, name="layer", seed=seed)
    nn.init.normal_(spectrum.coefficients, std=0.1)
    spectrum.coefficients.requires_grad_(method == "LoCA, coefficients")
    spectrum.locations.requires_grad_(method == "LoCA, locations")
    return spectrum


def blocks(point: Point, rank: int) -> dict[str, Callable[[], object]]:
    """Return forward and backward of a ViT block with heads of 64 and adapted query and value, by method."""
    job = Job(n_components=point.components, rank=rank)
    names = (FLOOR, LOCA, LOCATIONS, f"LoRA r={rank}", f"FourierFT n={point.components}, peft")
    work = _block(point)
    made = [methods(job)[name](work) for name in names]
    return {method: Step(model, work).gradients for method, model in zip(METHODS, made, strict=True)}


def _block(point: Point) -> Workload:
    """Return a ViT block whose tokens form sequences of 256, or of the largest smaller length that divides them."""
    length = max(count for count in range(1, 257) if point.tokens % count == 0)
    shape = (point.tokens // length, length, point.width)
    x, direction = torch.randn(shape, requires_grad=True), torch.randn(shape)
    block = nn.Sequential(Block(point.width, max(1, point.width // 64), qkv_bias=True)).requires_grad_(False)
    return Workload(block, x, lambda model: (model(x) * direction).sum(), None, ("q", "v"), ("qkv",))
