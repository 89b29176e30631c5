"""Models of diffusers with an adapter for one sample of a batch and none for the other."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from loca_vision import LoCAConfig, inject, per_sample, remove, set_adapters
from loca_vision.layers.targets import find_targets
from support import diffusers_zoo as zoo
from support.mixed import stir

pytestmark = pytest.mark.skipif(not diffusers.__version__.startswith(zoo.VERSION), reason="the zoo is that of another version")
PARTS = ("q", "k", "v", "out", "fc1", "fc2", "proj_in", "proj_out")
MODELS = (
    "UNet2DConditionModel",
    "UNet3DConditionModel",
    "UNetSpatioTemporalConditionModel",
    "StableCascadeUNet",
    "ControlNetModel",
    "SD3Transformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "LTXVideoTransformer3DModel",
    "WanTransformer3DModel",
    "AutoencoderKL",
)


def joined(one: Any, other: Any) -> Any:
    """The arguments of two calls with one sample each as those of one call."""
    if isinstance(one, Tensor):
        return torch.cat([one, other]) if one.dim() and len(one) == 1 else one
    if isinstance(one, dict):
        return {key: joined(one[key], other[key]) for key in one}
    if isinstance(one, (list, tuple)):
        return type(one)(map(joined, one, other))
    return one


@torch.no_grad()
def answer(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(0)
    return first_tensor(model(**inputs))


def first_tensor(found: Any) -> Tensor:
    if isinstance(found, Tensor):
        return found
    return first_tensor(next(iter(found.values())) if isinstance(found, dict) else found[-1])


@pytest.mark.parametrize("name", MODELS)
def test_one_sample_has_the_adapter(name: str) -> None:
    model, make = zoo.model(name), zoo.CASES[name].inputs
    inputs = make()
    first = next(value for value in inputs.values() if isinstance(value, Tensor))
    inputs = joined(inputs, make()) if len(first) == 1 else inputs
    entries = ["a", None] * (max(2, len(first)) // 2)
    parts = tuple(part for part in PARTS if any(target.part == part for target in find_targets(model)))
    inject(model, LoCAConfig(n_components=2, targets=parts), "a")
    try:
        stir(model, "a")
        adapted = answer(model, inputs)
        set_adapters(model, [])
        plain = answer(model, inputs)
        with per_sample(model, entries):
            found = answer(model, inputs)
    finally:
        remove(model)
    wanted = torch.stack([(plain if entry is None else adapted)[i] for i, entry in enumerate(entries)])
    assert (adapted - plain).abs().max() > 1e-4 * plain.abs().max()
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_tokens_before_samples_are_refused() -> None:
    model, make = zoo.model("ErnieImageTransformer2DModel"), zoo.CASES["ErnieImageTransformer2DModel"].inputs
    inject(model, LoCAConfig(n_components=2, targets=("fc1",)), "a")  # its attention is called with the samples first
    try:
        stir(model, "a")
        with (
            per_sample(model, ["a", None]),
            pytest.raises(ValueError, match="which are not those of one sample after the other"),
        ):
            answer(model, joined(make(), make()))
    finally:
        remove(model)
