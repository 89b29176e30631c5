"""Every kind of adapter by its formula, in float64 with dense matrices, and models with the result in their weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor, nn

from loca_vision import FourierFTConfig, LoCAConfig, LoRAConfig, SDCTFTConfig, SeLoRAConfig, WaveFTConfig, adapters
from loca_vision.model.target_checks import targets_for

TARGETS = ("q", "v", "out", "fc1")
KINDS = {
    "loca": LoCAConfig(n_components=40, scale=1.5, targets=TARGETS),
    "sdctft": SDCTFTConfig(n_components=40, scale=1.5, targets=TARGETS),
    "fourierft": FourierFTConfig(n_components=40, scale=60.0, targets=TARGETS),
    "waveft": WaveFTConfig(n_components=40, scale=1.5, targets=TARGETS),
    "lora": LoRAConfig(r=3, alpha=2.0, targets=TARGETS),
    "dora": LoRAConfig(r=3, alpha=2.0, use_dora=True, targets=TARGETS),
    "selora haar": SeLoRAConfig(r=3, alpha=2.0, eta=0.4, targets=TARGETS),
    "selora fft": SeLoRAConfig(r=3, alpha=2.0, eta=0.4, basis="fft", targets=TARGETS),
    "selora dora": SeLoRAConfig(r=3, alpha=2.0, eta=0.4, use_dora=True, targets=TARGETS),
}


def changed(config: Any, values: dict[str, Tensor], weight: Tensor) -> Tensor:
    """W', (p, q) float64, from W and the named numbers of one update; differentiable in the numbers."""
    weight = weight.double()
    if isinstance(config, (LoCAConfig, SDCTFTConfig, FourierFTConfig, WaveFTConfig)):
        inverse = INVERSES.get(type(config), cosine_inverse)
        rows, cols = (values["locations"].double() * (torch.tensor(weight.shape) - 1)).round().long().T
        return weight + config.scale * inverse(spread(values["coefficients"], rows * weight.shape[1] + cols, weight.shape))
    up, down = factors(config, values, weight.shape)
    moved = weight + config.alpha / config.r * up @ down
    if not config.use_dora:
        return moved
    return values["magnitude"].double()[:, None] * moved / moved.detach().square().sum(1, keepdim=True).sqrt()


def factors(config: Any, values: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The factors B (p, r) and A (r, q)."""
    if isinstance(config, LoRAConfig):
        return values["up"].double(), values["down"].double()
    sizes = {"up": (shape[0], config.r), "down": (config.r, shape[1])}
    spectra = {h: spread(values[f"{h}_coefficients"], values[f"{h}_cells"], size) for h, size in sizes.items()}
    if config.basis == "haar":
        return haar_inverse(spectra["up"]), haar_inverse(spectra["down"])
    return tuple(fourier_inverse(s) * s.numel() ** 0.5 for s in spectra.values())  # type: ignore[return-value]


def spread(values: Tensor, flat: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix that is zero except for values (n,) at flat cells (n,); values at the same cell add up."""
    return torch.zeros(shape[0] * shape[1], dtype=torch.float64).index_add(0, flat, values.double()).view(shape)


def cosine_inverse(spectrum: Tensor) -> Tensor:
    rows, cols = (torch.from_numpy(dct(np.eye(size), axis=0, norm="ortho")) for size in spectrum.shape)
    return rows.T @ spectrum @ cols


def fourier_inverse(spectrum: Tensor) -> Tensor:
    """The real part of the inverse discrete Fourier transform, summed by its definition."""
    rows, cols = (
        torch.exp(2j * torch.pi * torch.outer(torch.arange(n), torch.arange(n)).double() / n) / n for n in spectrum.shape
    )
    return (rows @ spectrum.to(torch.complex128) @ cols).real


def wavelet_inverse(spectrum: Tensor) -> Tensor:
    """One level of Haar's wavelet: the first half of an axis averages, the second one details. Odd sizes lose a border."""
    sizes = [size + size % 2 for size in spectrum.shape]
    rows, cols = (torch.from_numpy(haar_level(size)) for size in sizes)
    padded = nn.functional.pad(spectrum, (0, sizes[1] - spectrum.shape[1], 0, sizes[0] - spectrum.shape[0]))
    half = [size // 2 for size in sizes]
    swapped = padded.clone()  # the upper right quarter has the details along the rows' axis
    swapped[: half[0], half[1] :], swapped[half[0] :, : half[1]] = padded[half[0] :, : half[1]], padded[: half[0], half[1] :]
    return (rows.T @ swapped @ cols)[: spectrum.shape[0], : spectrum.shape[1]]


def haar_level(size: int) -> np.ndarray[Any, Any]:
    """(n, n) of an even n: the averages of neighbours, then their differences."""
    identity = np.eye(size)
    return np.concatenate([identity[::2] + identity[1::2], identity[::2] - identity[1::2]]) / np.sqrt(2)


def haar_inverse(spectrum: Tensor) -> Tensor:
    rows, cols = (torch.from_numpy(haar_matrix(size)) for size in spectrum.shape)
    return rows.T @ spectrum @ cols


@cache
def haar_matrix(size: int) -> np.ndarray[Any, Any]:
    """(n, n), row by row: the average, then details from coarse to fine, each by averaging neighbours of the level below."""
    averages, details = np.eye(size), []
    while len(averages) > 1:
        even, odd, last = averages[0:-1:2], averages[1::2], averages[len(averages) // 2 * 2 :]
        details.append((even - odd) / np.sqrt(2))
        averages = np.concatenate([(even + odd) / np.sqrt(2), last])
    return np.concatenate([averages, *reversed(details)])


@torch.no_grad()
def stir(model: nn.Module, name: str = "default", seed: int = 3) -> nn.Module:
    """Change everything an adapter learns, so that it has a visible effect."""
    generator = torch.Generator().manual_seed(seed)
    for update in adapters(model, name).values():
        for key, value in update.named_parameters():
            noise = torch.randn(value.shape, generator=generator).to(value.device)
            if key == "magnitude":
                value.mul_(1 + 0.2 * noise)
            elif key != "locations":
                value.add_(0.3 * noise)
            elif value.requires_grad:
                value.copy_(torch.rand(value.shape, generator=generator))
    return model


def numbers(update: nn.Module) -> dict[str, Tensor]:
    """All numbers that define one update, by name, on the CPU."""
    return {key: value.detach().cpu().clone() for key, value in update.state_dict().items()}


@torch.no_grad()
def written(base: nn.Module, *terms: tuple[Any, dict[str, nn.Module], float]) -> nn.Module:
    """A model without adapters with W + the sum of strength * (W' - W) in its weights.

    Args:
        terms: of each adapter its settings, its updates by projection, and its strength.
    """
    changes = []
    for config, updates, strength in terms:
        for target in targets_for(base, config):
            weight = target.weight()
            change = strength * (changed(config, numbers(updates[target.name]), weight) - weight.double())
            changes.append((target.layer.weight, slice(None) if target.rows is None else target.rows, change))
    for weight, rows, change in changes:
        weight[rows] = (weight[rows].double() + change).to(weight.dtype)
    return base


INVERSES: dict[type, Any] = {FourierFTConfig: fourier_inverse, WaveFTConfig: wavelet_inverse}
