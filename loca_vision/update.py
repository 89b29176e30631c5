"""What all kinds of adapter are made of: the update of one weight, from few trained numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loca_vision.offload import stored


class Update(nn.Module):
    """Delta W of shape (p, q), from parameters and buffers that a subclass has.

    A subclass says how the matrix is made (`delta`), or, where it has a low rank, which two factors make it (`factors`). All
    else is the same for all kinds: where it goes, how it is saved, cast, merged, weighed and swapped.

    Attributes:
        shape: (p, q), rows (out_features) and columns (in_features) of the weight.
        scale: a factor of the update.
        needs_weight: whether the update depends on the weight it is added to.
        rests: whether it is to be passed over, since the adapter that took another's place has nothing for this weight.
    """

    needs_weight = False

    def __init__(self, shape: tuple[int, int], scale: float = 1.0) -> None:
        super().__init__()
        self.shape = shape
        self.scale = scale
        self.rests = False

    def delta(self, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """`strength` times the update, (p, q) float32, differentiable in what is learned; `weight` where needed."""
        pair = self.factors(strength)
        if pair is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a delta nor factors")
        return pair[0] @ pair[1]

    def factors(self, strength: float = 1.0) -> tuple[Tensor, Tensor] | None:
        """(p, r) and (r, q), whose product is `delta`; None for an update that is not of low rank."""
        return None

    def applied(self, x: Tensor, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """x times `strength` times the update, x Delta W^T: (..., q) to (..., p) in x's dtype, without gradients."""
        pair = self.factors(strength)
        if pair is None:
            return F.linear(x, self.delta(strength, weight).to(x))
        return F.linear(F.linear(x, pair[1].to(x)), pair[0].to(x))

    def forward(self, strength: float = 1.0, x: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        """`delta`, or, given activations, `applied`: through here, so that hooks which bring offloaded tensors see it."""
        return self.delta(strength, weight) if x is None else self.applied(x, strength, weight)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that the update is made from."""
        return (*self.parameters(), *self.buffers())

    def learned(self) -> list[nn.Parameter]:
        """The parameters that training moves at the rate of the adapter."""
        return list(self.parameters())

    def check_room(self, other: Update, place: str) -> None:
        """Raise where `other` could not take this update's place; `place` is for the sentence."""
        theirs = other.state_dict()
        for key, mine in self.state_dict().items():
            if type(self) is not type(other) or key not in theirs or theirs[key].shape != mine.shape:
                raise ValueError(f"{place} is of another kind or size in the adapter that it should replace")

    @torch.no_grad()
    def take_over(self, other: Update | None) -> None:
        """Become what `other` is, in the same tensors, so that nothing is compiled anew; without one, rest."""
        self.rests = other is None or other.rests
        if other is not None:
            self.scale = other.scale
            for key in other.state_dict():
                stored(self, key).copy_(stored(other, key))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Update:
        # Follow to another device, never to another precision: bfloat16 has no whole numbers above 256, and trained
        # numbers move by less than its spacing.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        result: Update = super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        return f"shape={self.shape}, trained={sum(p.numel() for p in self.learned())}, scale={self.scale:g}"
