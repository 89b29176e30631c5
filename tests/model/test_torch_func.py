"""torch.func sees through adapted layers: gradients, per-sample gradients, forward mode, second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from loca_vision import FourierFTConfig, LoCAConfig, LoRAConfig, SeLoRAConfig, adapters, inject
from support.adapter_files import IMAGES, tiny
from support.pipelines import stable_diffusion

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.func's own, about where it will live
TARGETS = torch.tensor([0, 2])
METHODS = {
    "LoCA": LoCAConfig(n_components=20, targets=("q", "out", "fc1")),
    "LoCA, forward differences": LoCAConfig(n_components=20, location_gradient="forward"),
    "FourierFT": FourierFTConfig(n_components=20),
    "LoRA": LoRAConfig(r=2),
    "DoRA": LoRAConfig(r=2, use_dora=True),
    "SeLoRA": SeLoRAConfig(r=4),
}


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = tiny()
    inject(model, METHODS[request.param])
    with torch.no_grad():
        for update in adapters(model).values():
            for parameter in update.trainable():
                parameter.normal_(std=0.3)
    return model


def learned(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module) -> Any:
    def loss(parameters: dict[str, Tensor], images: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, parameters, (images,)), targets)

    return loss


def by_backward(model: nn.Module) -> dict[str, Tensor]:
    F.cross_entropy(model(IMAGES), TARGETS).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6)


def test_gradients_and_their_mean_over_samples(model: nn.Module) -> None:
    expected, parameters = by_backward(model), learned(model)
    assert_close(grad(loss_of(model))(parameters, IMAGES, TARGETS), expected)
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no batching rule
        each = vmap(grad(loss_of(model)), in_dims=(None, 0, 0))(parameters, IMAGES[:, None], TARGETS[:, None])
    assert_close({name: value.mean(0) for name, value in each.items()}, expected)


def test_forward_mode(model: nn.Module) -> None:
    expected, parameters = by_backward(model), learned(model)
    directions = {name: torch.randn_like(value) for name, value in parameters.items()}
    with sdpa_kernel(SDPBackend.MATH):  # the other kernels have no forward mode
        _, slope = jvp(lambda values: loss_of(model)(values, IMAGES, TARGETS), (parameters,), (directions,))
    torch.testing.assert_close(slope, sum((expected[n] * directions[n]).sum() for n in expected), rtol=1e-3, atol=1e-5)


def test_second_derivatives(model: nn.Module) -> None:
    """Of torch.func, against finite differences; of backward(), a refusal that names torch.func."""
    with sdpa_kernel(SDPBackend.MATH):
        direction, step = torch.randn_like(IMAGES), 1e-3
        slope = grad(lambda images: F.cross_entropy(model(images), TARGETS))
        _, curvature = jvp(slope, (IMAGES,), (direction,))
        numerical = (slope(IMAGES + step * direction) - slope(IMAGES - step * direction)) / (2 * step)
        curvature, numerical = curvature.detach(), numerical.detach()
        torch.testing.assert_close(curvature, numerical, rtol=0.05, atol=0.05 * float(numerical.abs().max()))
    images = IMAGES.clone().requires_grad_()
    (first,) = torch.autograd.grad(F.cross_entropy(model(images), TARGETS), images, create_graph=True)
    try:
        first.square().sum().backward()
    except RuntimeError as error:
        assert "take second derivatives with torch.func" in str(error)
    else:
        assert images.grad is not None


def test_a_model_that_takes_a_scale_in_its_call() -> None:
    """Each call writes the scale down for compiled code, which torch.func would refuse."""
    pipe = stable_diffusion()
    inject(pipe.unet, LoCAConfig(n_components=20, targets=("q", "proj_in")))
    with torch.no_grad():
        for update in adapters(pipe.unet).values():
            update.coefficients.normal_()
    size = pipe.unet.config.sample_size
    inputs = (torch.randn(1, pipe.unet.config.in_channels, size, size), torch.tensor(3))
    text = torch.randn(1, 4, pipe.unet.config.cross_attention_dim)
    chosen = {name: value for name, value in learned(pipe.unet).items() if name.endswith("coefficients")}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(pipe.unet, parameters, (*inputs, text)).sample.square().mean()

    found = grad(loss)(chosen)
    pipe.unet(*inputs, text).sample.square().mean().backward()
    for name, parameter in pipe.unet.named_parameters():
        if name in found:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6)
