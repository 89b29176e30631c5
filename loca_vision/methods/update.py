"""The update of one weight, made from a few trained numbers: the base class of every method's update."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loca_vision.functional.cosine_atoms import Cosines
from loca_vision.functional.sample_spectra import SampleSpectrum
from loca_vision.functional.token_bases import TokenBasis
from loca_vision.offload import stored_at

Operation = Literal["delta", "apply_to", "add_to"]


class Update(nn.Module):
    """Delta W of shape (p, q), made from the float32 parameters and buffers of a subclass.

    A subclass defines how the matrix is built (`delta`) or, if it has low rank, its two factors (`factors`). Everything else
    is the same for all methods: where the update goes and how it is saved, cast, merged, weighted and swapped.

    Attributes:
        shape: (p, q), rows (out_features) and columns (in_features) of the weight.
        scale: a factor of the update.
        needs_weight: whether the update depends on the weight it is added to.
        float32_only: the names of the tensors that files store in float32 even if the rest is float16.
        inactive: True after a hot swap to an adapter that has no update for this weight; the update is then skipped.
    """

    needs_weight = False
    float32_only: tuple[str, ...] = ()

    def __init__(self, shape: tuple[int, int], scale: float = 1.0) -> None:
        super().__init__()
        self.shape = shape
        self.scale = scale
        self.inactive = False

    def delta(self, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """Return `strength` times the update, (p, q) float32, differentiable in the trained parameters.

        `weight` is used only if the update `needs_weight`.
        """
        pair = self.factors(strength)
        if pair is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a delta nor factors")
        return pair[0] @ pair[1]

    def factors(self, strength: float = 1.0) -> tuple[Tensor, Tensor] | None:
        """Return factors (p, r) and (r, q) whose product is `delta`, or None if the update is not of low rank."""
        return None

    def cosines(self, strength: float = 1.0) -> Cosines | None:
        """Return `delta` as a sum of cosine atoms, whose gradient needs no matrix, or None if it is not such a sum."""
        return None

    def token_spectrum(self) -> tuple[TokenBasis, SampleSpectrum] | None:
        """Return the basis for transforming activations and the update's sparse spectrum in it, or None if it has none.

        Samples of a batch that have different updates can then share their transforms.
        """
        return None

    @torch.no_grad()
    def norm(self) -> float | None:
        """Return the Frobenius norm of the update, or None if the update depends on the weight."""
        pair = self.factors()
        if pair is None:
            return None if self.needs_weight else float(self.delta().norm())
        up, down = pair[0].double(), pair[1].double()  # without building it: |B A|^2 is the trace of (B^T B) (A A^T)
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())

    def apply_to(self, x: Tensor, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """Return `strength` times x Delta W^T, from (..., q) to (..., p) in x's dtype, without gradients."""
        pair = self.factors(strength)
        if pair is None:
            return F.linear(x, self.delta(strength, weight).to(x))
        return F.linear(F.linear(x, pair[1].to(x)), pair[0].to(x))

    def add_to(self, onto: Tensor, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """Add `delta` to `onto` (p, q), float32 or float64, in place and without gradients, and return `onto`."""
        return onto.add_(self.delta(strength, weight).to(onto))

    def forward(self, operation: Operation = "delta", *inputs: Any) -> Tensor:
        """Run `delta`, `apply_to` or `add_to`; calling them through `forward` triggers hooks that load offloaded tensors.

        Autocast is meant for activations: it does not affect how a matrix is built, because the matrix may be cached.
        """
        run = getattr(self, operation)
        device = next((value.device.type for value in self.tensors()), "cpu")
        if operation == "apply_to" or not _has_autocast(device):
            return run(*inputs)  # type: ignore[no-any-return]
        with torch.autocast(device, enabled=False):
            return run(*inputs)  # type: ignore[no-any-return]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors that the update is made from."""
        return (*self.parameters(), *self.buffers())

    def learns(self) -> bool:
        """Whether training can change the update now."""
        return any([value.requires_grad for value in self.tensors()])

    def is_trained(self) -> bool:
        """Whether the update is meant to be trained, even if a schedule has frozen all of it for now."""
        return self.learns()

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters that are trained at the adapter's learning rate."""
        return list(self.parameters())

    def location_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained at the locations' learning rate; none if no locations are learned."""
        return []

    def check_fits(self, other: Update, place: str) -> None:
        """Raise ValueError if `other` cannot replace this update; the message names `place`."""
        sizes = [{key: value.shape for key, value in update.state_dict().items()} for update in (self, other)]
        if type(self) is not type(other) or sizes[0] != sizes[1]:
            raise ValueError(f"{place} is of another kind or size in the adapter that it should replace")

    @torch.no_grad()
    def copy_from(self, other: Update | None) -> None:
        """Copy `other` into this update's own tensors, so that nothing is recompiled; None makes this update inactive."""
        self.inactive = other is None or other.inactive
        if other is not None:
            self.__dict__.update({name: value for name, value in vars(other).items() if _is_setting(name)})
            for key in other.state_dict():
                stored_at(self, key).copy_(stored_at(other, key))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Update:
        # Follow the model to another device but never to another precision: bfloat16 cannot represent all integers above
        # 256, and training changes numbers by less than its spacing.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        result: Update = super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        return f"shape={self.shape}, trained={sum(p.numel() for p in self.trainable())}, scale={self.scale:g}"


def _is_setting(name: str) -> bool:
    """Whether an attribute describes the update itself, rather than how it is cached, hooked or trained."""
    return not name.startswith("_") and name not in ("forward", "training")


def _has_autocast(device: str) -> bool:
    """Whether the device has autocast: the meta device has none.

    Compiled code never runs on the meta device; it cannot ask torch before version 2.14 and therefore assumes autocast.
    """
    return device != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device))
