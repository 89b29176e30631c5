"""Attention processors and oracles for the tests in pipeline/attn_processor/."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from loca_vision import LoCAConfig
from loca_vision.diffusers import LoCAAttnProcessor

CONFIG = LoCAConfig(n_components=12, scale=2.0, targets=("q", "k", "v", "out"))


ATTENTION = "mid_block.attentions.0.transformer_blocks.0.attn2"


class Biased(AttnProcessor):
    """A third-party processor that takes an argument of its own."""

    heard: list[dict[str, Any]]

    def __init__(self, bias: float = 0.5) -> None:
        super().__init__()
        self.bias = bias
        self.heard = []

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        strength: float = 1.0,
        mask: Any = None,
    ) -> Tensor:
        self.heard.append({"strength": strength, "mask": mask})
        result: Tensor = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return result + self.bias * strength


def wrap(model: nn.Module, config: LoCAConfig = CONFIG, processor: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Set a LoCA processor in every attention layer, and return them by the path of the layer."""
    made = {
        path.removesuffix(".processor"): LoCAAttnProcessor.of(
            model.get_submodule(path.removesuffix(".processor")),
            config,
            processor() if processor else None,
            name=path.removesuffix(".processor"),
        )
        for path in model.attn_processors  # type: ignore[union-attr]
    }
    model.set_attn_processor({f"{path}.processor": each for path, each in made.items()})  # type: ignore[operator]
    return made


@torch.no_grad()
def scatter(made: dict[str, Any], size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(3)
    for processor in made.values():
        for spectrum in processor.spectra.values():
            spectrum.coefficients.copy_(torch.randn(spectrum.coefficients.shape, generator=generator) * size)


@torch.no_grad()
def with_updates(model: nn.Module, made: dict[str, Any], strength: float = 1.0) -> nn.Module:
    """Write W + the updates of the processors into the weights of another model of the same kind."""
    for path, processor in made.items():
        attention: Any = model.get_submodule(path)
        for part, spectrum in processor.spectra.items():
            layer = getattr(attention, {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out"}[part])
            layer = layer[0] if part == "out" else layer
            rows, cols = layer.weight.shape
            dense = torch.zeros(rows, cols, dtype=torch.float64)
            cells = spectrum.cells
            dense.index_put_((cells[:, 0], cells[:, 1]), spectrum.coefficients.double(), accumulate=True)
            layer.weight += strength * spectrum.scale * (basis(rows).T @ dense @ basis(cols)).float()
    return model


def basis(size: int) -> Tensor:
    """The matrix of the orthonormal cosine transform, one row per frequency."""
    steps = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(torch.pi * steps[:, None] * (2 * steps + 1) / (2 * size)) * (2 / size) ** 0.5
    rows[0] /= 2**0.5
    return rows
