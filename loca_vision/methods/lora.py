"""LoRA, and its weight-decomposed variant DoRA (arXiv 2106.09685; 2402.09353)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from loca_vision.checks import check_count, check_factor, check_flag
from loca_vision.methods.adapter_config import AdapterConfig, Projection
from loca_vision.methods.registry import kind
from loca_vision.methods.update import Update


class LowRank(Update):
    """Delta W = scale * B A for B (p, r) and A (r, q); or, with a magnitude m (p,), DoRA's m V / |V| - W, V = W + scale * B A.

    The norm is taken over each row of V, one per output feature; no gradient flows through it (DoRA, section 4.3).

    Attributes:
        magnitude: (p,) float32 parameter; None for plain LoRA.
    """

    float32_only = ("magnitude",)  # rounding it would change the whole weight, by more than a small update does
    magnitude: nn.Parameter | None

    def __init__(self, shape: tuple[int, int], scale: float, *, weight_decomposed: bool) -> None:
        super().__init__(shape, scale)
        self.needs_weight = weight_decomposed
        magnitude = nn.Parameter(torch.zeros(shape[0], dtype=torch.float32)) if weight_decomposed else None
        self.register_parameter("magnitude", magnitude)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return B (p, r) and A (r, q), differentiable in the trained parameters."""
        raise NotImplementedError

    def factors(self, strength: float = 1.0) -> tuple[Tensor, Tensor] | None:
        if self.magnitude is not None:
            return None
        (up, down), factor = self.pair(), self.scale * strength
        return up if factor == 1 else up * factor, down

    def delta(self, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        if self.magnitude is None:
            return super().delta(strength)
        if weight is None:
            raise ValueError("a weight-decomposed update depends on the weight: give it as `weight`")
        up, down = self.pair()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        moved = weight + self.scale * (up @ down)
        return strength * ((self.magnitude / row_norms(moved.detach()))[:, None] * moved - weight)


class LoRA(LowRank):
    """Plain factors: the float32 parameters `up` (p, r) and `down` (r, q)."""

    def __init__(self, shape: tuple[int, int], rank: int, scale: float, *, weight_decomposed: bool = False) -> None:
        super().__init__(shape, scale, weight_decomposed=weight_decomposed)
        self.up = nn.Parameter(torch.zeros(shape[0], rank, dtype=torch.float32))
        self.down = nn.Parameter(torch.zeros(rank, shape[1], dtype=torch.float32))

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.up, self.down


def row_norms(weight: Tensor) -> Tensor:
    """Return the (p,) norms of the rows; 1 for a row of zeros, so that dividing by it leaves the row zero."""
    norms = torch.linalg.vector_norm(weight, dim=1)
    return torch.where(norms > 0, norms, 1)


@kind
@dataclass(frozen=True)
class LoRAConfig(AdapterConfig):
    """The settings of LoRA: W' = W0 + (alpha / r) B A, with B initialized to zero; or of DoRA.

    A file holds `<projection>.up` (p, r), `<projection>.down` (r, q) and, for DoRA, `<projection>.magnitude` (p,).

    Args:
        r: the rank, that is, the number of columns of B and of rows of A.
        alpha: `lora_alpha` in peft.
        targets: which projections to adapt, as in `AdapterConfig`. Each part of a fused qkv has its own factors, unlike in
            peft, which adapts the fused layer as a whole.
        use_dora: learn the magnitude of each row separately from its direction.
        seed: the seed for the initial A, uniform in +-1 / sqrt(q) as in peft.
        layers: name patterns of the layers to adapt, as in `AdapterConfig`; None: all.

    Raises:
        ValueError: a field is invalid; the message names the field, its value and the rule.
    """

    method: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    summary: ClassVar[str] = "two factors of low rank, or DoRA"
    lr: ClassVar[float] = 5e-3
    lr_grid: ClassVar[tuple[float, ...]] = (5e-4, 1.5e-3, 5e-3)

    r: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q", "v")
    use_dora: bool = False
    seed: int = 0
    layers: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_factor("alpha", self.alpha)
        check_flag("use_dora", self.use_dora)
        object.__setattr__(self, "alpha", float(self.alpha))

    @classmethod
    def editing_defaults(cls, chosen: Mapping[str, Any]) -> dict[str, Any]:
        return editing_rank(chosen)

    @classmethod
    def at_budget(cls, numbers: int, shape: tuple[int, int]) -> dict[str, Any]:
        rank = numbers // sum(shape)
        return {"r": rank, "alpha": float(rank)}

    @property
    def scale(self) -> float:
        return self.alpha / self.r

    def build(self, shape: tuple[int, int]) -> LoRA:
        check_rank(self.r, shape)
        return LoRA(shape, self.r, self.scale, weight_decomposed=self.use_dora)

    def initialize(self, update: LoRA, projection: Projection, generator: torch.Generator) -> None:
        nn.init.kaiming_uniform_(update.down, a=math.sqrt(5), generator=generator)
        start_magnitude(update, projection)

    def check_values(self, projection: str, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> None:
        check_product(projection, self.scale, tensors[f"{projection}.up"], tensors[f"{projection}.down"])


def editing_rank(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rank that diffusers' scripts use, with alpha equal to the rank so that the scale is 1."""
    return {"r": 4, "alpha": float(chosen.get("r", 4))}


def start_magnitude(update: LowRank, projection: Projection) -> None:
    """Set DoRA's magnitudes to their initial values, the norms of the weight's rows."""
    if update.magnitude is not None:
        update.magnitude.copy_(row_norms(projection.weight().detach().float()))


def check_rank(r: int, shape: tuple[int, int]) -> None:
    """Raise ValueError if the rank is larger than that of any matrix of the shape."""
    if r > min(shape):
        raise ValueError(f"r={r}: a {shape[0]} x {shape[1]} matrix has at most the rank {min(shape)}")


def check_product(projection: str, scale: float, up: Tensor, down: Tensor) -> None:
    size = abs(scale) * up.double().abs().sum() * down.double().abs().sum()
    if size > torch.finfo(torch.float32).max:
        raise ValueError(f"{projection}: its factors times the scale {scale:g} overflow float32")
