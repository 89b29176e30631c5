"""The update of one weight, from few trained numbers: the base class of every method."""

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
    """Delta W of shape (p, q), from float32 parameters and buffers that a subclass has.

    A subclass says how the matrix is made (`delta`), or, where it has a low rank, which two factors make it (`factors`). All
    else is the same for all kinds: where it goes, how it is saved, cast, merged, weighed and swapped.

    Attributes:
        shape: (p, q), rows (out_features) and columns (in_features) of the weight.
        scale: a factor of the update.
        needs_weight: whether the update depends on the weight it is added to.
        float32_only: the names of the tensors that files hold in float32 even if the rest is float16.
        inactive: True after a hot swap to an adapter that has nothing for this weight; the update is then skipped.
    """

    needs_weight = False
    float32_only: tuple[str, ...] = ()

    def __init__(self, shape: tuple[int, int], scale: float = 1.0) -> None:
        super().__init__()
        self.shape = shape
        self.scale = scale
        self.inactive = False

    def delta(self, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """`strength` times the update, (p, q) float32, differentiable in what is learned; `weight` where needed."""
        pair = self.factors(strength)
        if pair is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a delta nor factors")
        return pair[0] @ pair[1]

    def factors(self, strength: float = 1.0) -> tuple[Tensor, Tensor] | None:
        """(p, r) and (r, q), whose product is `delta`; None for an update that is not of low rank."""
        return None

    def cosines(self, strength: float = 1.0) -> Cosines | None:
        """Where `delta` is a sum of cosine atoms, that sum, whose gradient needs no matrix; None for any other."""
        return None

    def token_spectrum(self) -> tuple[TokenBasis, SampleSpectrum] | None:
        """Where the update is a sparse spectrum, the transform of activations in which it is one; None for any other.

        Samples of a batch that have different updates then share their transforms.
        """
        return None

    @torch.no_grad()
    def norm(self) -> float | None:
        """The Frobenius norm of the update; None for one that depends on the weight."""
        pair = self.factors()
        if pair is None:
            return None if self.needs_weight else float(self.delta().norm())
        up, down = pair[0].double(), pair[1].double()  # without building it: |B A|^2 is the trace of (B^T B) (A A^T)
        return float(((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt())

    def apply_to(self, x: Tensor, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """x times `strength` times the update, x Delta W^T: (..., q) to (..., p) in x's dtype, without gradients."""
        pair = self.factors(strength)
        if pair is None:
            return F.linear(x, self.delta(strength, weight).to(x))
        return F.linear(F.linear(x, pair[1].to(x)), pair[0].to(x))

    def add_to(self, onto: Tensor, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        """Add `delta` to `onto` (p, q), float32 or float64, in place and without gradients; returns `onto`."""
        return onto.add_(self.delta(strength, weight).to(onto))

    def forward(self, operation: Operation = "delta", *inputs: Any) -> Tensor:
        """Run `delta`, `apply_to` or `add_to`: called through here, hooks that bring offloaded tensors see the call.

        Autocast is for activations: a matrix made under it is the same as without, because it may be cached.
        """
        run = getattr(self, operation)
        device = next((value.device.type for value in self.tensors()), "cpu")
        if operation == "apply_to" or not _has_autocast(device):
            return run(*inputs)  # type: ignore[no-any-return]
        with torch.autocast(device, enabled=False):
            return run(*inputs)  # type: ignore[no-any-return]

    def tensors(self) -> tuple[Tensor, ...]:
        """All that the update is made from."""
        return (*self.parameters(), *self.buffers())

    def learns(self) -> bool:
        """Whether training can change anything of it now."""
        return any([value.requires_grad for value in self.tensors()])

    def is_trained(self) -> bool:
        """Whether it is there to be trained, whatever a schedule lets move now."""
        return self.learns()

    def trainable(self) -> list[nn.Parameter]:
        """The parameters that training moves at the rate of the adapter."""
        return list(self.parameters())

    def location_parameters(self) -> list[nn.Parameter]:
        """The parameters that training moves at the rate of locations: none, for a method without locations to learn."""
        return []

    def check_fits(self, other: Update, place: str) -> None:
        """Raise where `other` could not take this update's place; `place` is for the sentence."""
        sizes = [{key: value.shape for key, value in update.state_dict().items()} for update in (self, other)]
        if type(self) is not type(other) or sizes[0] != sizes[1]:
            raise ValueError(f"{place} is of another kind or size in the adapter that it should replace")

    @torch.no_grad()
    def copy_from(self, other: Update | None) -> None:
        """Become what `other` is, in the same tensors, so that nothing is compiled anew; without one, rest."""
        self.inactive = other is None or other.inactive
        if other is not None:
            self.__dict__.update({name: value for name, value in vars(other).items() if _is_setting(name)})
            for key in other.state_dict():
                stored_at(self, key).copy_(stored_at(other, key))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Update:
        # Follow to another device, never to another precision: bfloat16 has no whole numbers above 256, and trained
        # numbers move by less than its spacing.
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        result: Update = super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        return f"shape={self.shape}, trained={sum(p.numel() for p in self.trainable())}, scale={self.scale:g}"


def _is_setting(name: str) -> bool:
    """Whether an attribute of an update says what it is: not how it is kept, hooked or trained."""
    return not name.startswith("_") and name not in ("forward", "training")


def _has_autocast(device: str) -> bool:
    """There is none on the meta device. Compiled code, which cannot ask in torch before 2.14, runs elsewhere."""
    return device != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device))
