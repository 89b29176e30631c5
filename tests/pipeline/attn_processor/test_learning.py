"""LoCAAttnProcessor: training."""

from __future__ import annotations

from typing import Any

import torch

from support.pipelines import unet
from support.processors import basis, scatter, with_updates, wrap
from support.reference_weights import assert_near


def test_gradients_reach_the_spectra() -> None:
    model, oracle = unet(), unet()
    model.requires_grad_(False)
    made = wrap(model)
    scatter(made, 0.3)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 24)
    model(sample, 3, text).sample.square().mean().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {name for name, _ in model.named_parameters() if name.endswith(("coefficients", "locations"))}
    with_updates(oracle, made)
    oracle(sample, 3, text).sample.square().mean().backward()
    for path, processor in made.items():
        attention: Any = oracle.get_submodule(path)
        for part, spectrum in processor.spectra.items():
            layer = attention.to_out[0] if part == "out" else getattr(attention, f"to_{part}")
            rows, cols = layer.weight.shape
            spectral = basis(rows) @ layer.weight.grad.double() @ basis(cols).T
            wanted = spectrum.scale * spectral[spectrum.cells[:, 0], spectrum.cells[:, 1]]
            assert_near(spectrum.coefficients.grad.double(), wanted, 1e-6)
    assert max(float(s.coefficients.grad.abs().max()) for each in made.values() for s in each.spectra.values()) > 1e-4


def test_it_learns() -> None:
    model = unet()
    model.requires_grad_(False)
    wrap(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("coefficients"))
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    sample, text, target = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 24), torch.randn(2, 4, 8, 8)
    losses = []
    for _ in range(15):
        loss = (model(sample, 3, text).sample - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
