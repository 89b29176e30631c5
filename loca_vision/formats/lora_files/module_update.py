"""The update of one module's weight as another library's file has it, made from its tensors on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loca_vision.formats.lora_files.low_rank_pair import LowRankPair

MOST_CELLS = 2**31  # in a weight, as in adapter files: otherwise factors of a few kB could request any amount of memory


@dataclass(frozen=True)
class Magnitude:
    """The norms to which DoRA rescales a weight: those of its rows, or of its input channels.

    Args:
        norms: (p,), or (in_channels,).
        of_rows: whether they are norms of rows.
    """

    norms: Tensor
    of_rows: bool

    def applied(self, weight: Tensor) -> Tensor:
        """Return the weight (p, q) with these norms, in its dtype; a channel has as many columns as its kernel has cells.

        Raises:
            ValueError: a row or channel of zeros has no direction to keep.
        """
        norms = self.norms.to(weight.dtype)
        if self.of_rows:
            return weight * _ratio(norms, weight.norm(dim=1))[:, None]
        channels = weight.view(len(weight), len(norms), -1)
        return (channels * _ratio(norms, channels.transpose(0, 1).flatten(1).norm(dim=1))[:, None]).view(weight.shape)


def _ratio(norms: Tensor, now: Tensor) -> Tensor:
    if not now.all():
        raise ValueError("a row or column of the updated weight is zero, so that DoRA has no direction to rescale")
    return norms / now


@dataclass(frozen=True)
class ModuleUpdate:
    """The update of one module's weight.

    Args:
        kind: "LoRA", "LoHa", ...
        shape: (p, q) of the weight, flattened for a convolution.
        trained: the number of trained numbers that the update is made from.
        make: computes the update, before any rescaling by DoRA.
        kernel: (kh, kw) of a convolution; None for a linear layer.
        magnitude: the magnitude of DoRA, if any.
    """

    kind: str
    shape: tuple[int, int]
    trained: int
    make: Callable[[], Tensor | LowRankPair]
    kernel: tuple[int, int] | None = None
    magnitude: Magnitude | None = None

    @property
    def needs_weight(self) -> bool:
        return self.magnitude is not None

    @torch.no_grad()
    def read(self, weight: Tensor | None) -> Tensor | LowRankPair:
        """Return the update (p, q), given the weight (p, q) that it is for.

        Raises:
            ValueError: it depends on the weight (DoRA), which is not given; or it is not finite.
        """
        made = self.make()
        if isinstance(made, LowRankPair) and self.magnitude is None:
            return made
        delta = made.delta() if isinstance(made, LowRankPair) else made
        if self.magnitude is not None:
            if weight is None:
                raise ValueError("its update (DoRA) depends on the weight, which is not given")
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            delta = self.magnitude.applied(wide + delta) - wide
        if not torch.isfinite(delta).all():
            raise ValueError("its update is not finite")
        return delta

    @torch.no_grad()
    def decomposed(self) -> tuple[LowRankPair, Tensor] | None:
        """Return scale * B A and the magnitudes (p,) of a DoRA with one for each row; None for every other update."""
        made = self.make() if self.magnitude is not None and self.magnitude.of_rows else None
        return (made, self.magnitude.norms) if isinstance(made, LowRankPair) and self.magnitude is not None else None

    def part(self, rows: Tensor) -> ModuleUpdate:
        """Return the update of some rows.

        Raises:
            ValueError: DoRA's norms are of input channels, which span all rows.
        """
        if torch.equal(rows, torch.arange(self.shape[0])):
            return self
        magnitude = self.magnitude
        if magnitude is not None:
            if not magnitude.of_rows:
                raise ValueError("its DoRA has the norms of columns, and here only some of their rows are a module")
            magnitude = Magnitude(magnitude.norms[rows], True)

        def make() -> Tensor | LowRankPair:
            made = self.make()
            return LowRankPair(made.down, made.up[rows], made.scale) if isinstance(made, LowRankPair) else made[rows]

        trained = self.trained * len(rows) // self.shape[0]
        return ModuleUpdate(self.kind, (len(rows), self.shape[1]), trained, make, self.kernel, magnitude)
