"""Low-rank updates, as in LoRA, and the closest one to a given matrix (Eckart and Young, 1936)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRankPair:
    """Delta W = scale * up @ down.

    Args:
        down: (r, q), which LoRA calls A.
        up: (p, r), which LoRA calls B.
        scale: alpha / r, or alpha / sqrt(r) if ranks are stabilised.

    Raises:
        ValueError: the shapes do not fit each other, or the scale is not finite.
    """

    down: Tensor
    up: Tensor
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.down.dim() != 2 or self.up.dim() != 2 or self.down.shape[0] != self.up.shape[1] or not self.down.shape[0]:
            raise ValueError(
                f"up is {tuple(self.up.shape)} and down {tuple(self.down.shape)}: expected (p, r) and (r, q) with r >= 1"
            )
        if not math.isfinite(self.scale):
            raise ValueError(f"scale={self.scale!r}: expected a finite number")

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q) of the update."""
        return int(self.up.shape[0]), int(self.down.shape[1])

    def delta(self) -> Tensor:
        """Return the update, (p, q), in float32 or, if the factors are in it, float64."""
        wide = torch.promote_types(self.up.dtype, torch.float32)
        return self.scale * (self.up.to(wide) @ self.down.to(wide))


@dataclass(frozen=True)
class Truncated:
    """A matrix truncated to a rank.

    Args:
        pair: the factors, in float32; the columns of `up` and rows of `down` have equal norms.
        norm: Frobenius norm of the matrix.
        error: Frobenius norm of what is left out.
        squares: squared singular values of the matrix, the largest first; None if they were not requested.
    """

    pair: LowRankPair
    norm: float
    error: float
    squares: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def relative_error(self) -> float:
        """error / norm, from 0 to 1; 0 for a matrix of zeros."""
        return self.error / self.norm if self.norm else 0.0


def truncated(delta: Tensor | LowRankPair, rank: int) -> Truncated:
    """Return the matrix of rank at most `rank` closest to `delta`, by its singular values, which also give the error.

    The factors of a low-rank update are reduced to a small matrix first, so nothing of size (p, q) is built. If the update has
    that rank already, the error is 0 and the returned pair has the update's own rank.

    Raises:
        ValueError: the rank is below 1 or above min(p, q); `delta` is not a matrix; or it holds NaN or infinity.
    """
    shape = tuple(delta.shape)
    if len(shape) != 2:
        raise ValueError(f"delta has shape {shape}: expected a matrix")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= min(shape):
        raise ValueError(f"rank={rank!r}: a {shape[0]} x {shape[1]} matrix has ranks from 1 to {min(shape)}")
    left, values, right = _of_pair(delta) if isinstance(delta, LowRankPair) else _svd(delta.detach())
    squares = values.double().square()
    root = values[:rank].sqrt()
    up, down = left[:, :rank] * root, root[:, None] * right[:rank]
    pair = LowRankPair(down.float().contiguous(), up.float().contiguous())
    return Truncated(pair, math.sqrt(float(squares.sum())), math.sqrt(float(squares[rank:].sum())), squares)


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    if not torch.isfinite(matrix).all():
        raise ValueError("delta holds NaN or infinity")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left, values, right


def _of_pair(pair: LowRankPair) -> tuple[Tensor, Tensor, Tensor]:
    """Return orthonormal bases of both factors, and the singular values of the (r, r) matrix between them."""
    left, left_in = torch.linalg.qr(pair.up.detach().double())
    right, right_in = torch.linalg.qr(pair.down.detach().double().T)
    inner_left, values, inner_right = _svd(pair.scale * left_in @ right_in.T)
    return left @ inner_left, values, inner_right @ right.T


def cut(module: str, update: Tensor | LowRankPair, rank: int | None) -> Truncated:
    """Return the closest update of a given rank; its own factors if the rank is None or not below theirs.

    Raises:
        ValueError: the update has no factors yet, and `rank` is None.
    """
    if isinstance(update, LowRankPair) and (rank is None or update.rank <= rank):
        return Truncated(update, truncated(update, 1).norm, 0.0)
    if rank is None:
        raise ValueError(f"{module}: its update has no factors yet; say which rank they are to have")
    return truncated(update, min(rank, *update.shape))
