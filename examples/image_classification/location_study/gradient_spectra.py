"""Spectra of the gradients of query and value weights over a few batches, before an adapter is trained."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loca_vision.dct import dct2


@dataclass(frozen=True)
class GradientSpectrum:
    """The gradient spectrum of one projection.

    For each batch, Z = C G D^T, where G is the gradient of the mean loss with respect to the weight.

    Args:
        total: (p, q), the sum of Z over the batches.
        squares: (p, q), the sum of the squares of Z over the batches.
    """

    total: Tensor
    squares: Tensor


def gradient_spectra(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], projections: Collection[str]
) -> dict[str, GradientSpectrum]:
    """Return the gradient spectrum of each projection of a timm ViT with fused weights. Nothing is trained.

    Args:
        model: maps images or features to logits.
        batches: pairs of the model's input and the classes.
        projections: names such as `blocks.<i>.attn.q` and `blocks.<i>.attn.v`.
    """
    paths = sorted({name.rpartition(".")[0] for name in projections})
    weights = [model.get_parameter(f"{path}.qkv.weight") for path in paths]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    found: dict[str, GradientSpectrum] = {}
    for inputs, classes in batches:
        gradients = torch.autograd.grad(F.cross_entropy(model(inputs), classes), weights)
        for path, gradient in zip(paths, gradients, strict=True):
            for part, own in zip("qkv", gradient.chunk(3), strict=True):
                if f"{path}.{part}" in projections:
                    _add(found, f"{path}.{part}", dct2(own))
    for parameter, learned in flags:
        parameter.requires_grad_(learned)
    return found


def _add(found: dict[str, GradientSpectrum], name: str, spectrum: Tensor) -> None:
    if name not in found:
        found[name] = GradientSpectrum(torch.zeros_like(spectrum), torch.zeros_like(spectrum))
    found[name].total.add_(spectrum)
    found[name].squares.addcmul_(spectrum, spectrum)
