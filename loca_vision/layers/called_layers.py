"""Linear layers and 1 x 1 convolutions that are called, whose `weight` stays W for other code to read and write.

This is for the layers of diffusers and transformers, whose code calls them. peft fuses a LoRA into `layer.weight` in place, so
this must be W. A layer that is hooked, offloaded or quantised is called as it is, and the term of the updates is added.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.functional.transforms import compiled, functional_only, ordinary_tensors, traced
from loca_vision.layers.adapted_linear import AdaptedLayer
from loca_vision.layers.class_swap import once_while_traced
from loca_vision.layers.effective_weight import EffectiveWeight
from loca_vision.layers.mixed_call import may_mix, with_updates_of_call
from loca_vision.layers.plain_weight import as_matrix, is_plain_matrix
from loca_vision.layers.updated_call import UpdatedCall, is_hooked


class _CalledLayer(UpdatedCall, AdaptedLayer):
    """The common base of both kinds of layers: the layer computes with its own updates, inside any hooks it has."""

    @property
    def effective_weight(self) -> EffectiveWeight:  # type: ignore[override]
        return self.loca

    def _layer(self) -> Any:
        return self

    def _without_updates(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = super().forward(x, *args, **kwargs)
        return result

    def _may_keep(self, layer: Any, x: Tensor) -> bool:
        return not is_hooked(self)


class CalledLinear(_CalledLayer):
    """A mixin for the class of a linear layer that is called."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._called(x, *args, **kwargs)

    def _is_plain(self, layer: Any) -> bool:
        stock = self.original_class.forward is nn.Linear.forward
        return stock and not is_hooked(self) and is_plain_matrix(self._parameters.get("weight"))


def _memory(tensor: Tensor) -> tuple[int, torch.dtype]:
    return tensor.data_ptr(), tensor.dtype


class CalledConvolution(_CalledLayer):
    """A mixin for the class of a 1 x 1 convolution, whose weight (p, q, 1, 1) is a matrix."""

    def forward(self, x: Tensor) -> Tensor:
        if may_mix(self.loca):
            result = self._without_updates(x).movedim(1, -1)
            return with_updates_of_call(self.loca, x.movedim(1, -1), result, self._base, in_place=False).movedim(-1, 1)
        if compiled():
            self._prepare()
        matrix = None if is_hooked(self) or self._saves_memory() else self._matrix()
        if not self._acts():
            return self._without_updates(x)
        if matrix is not None:
            weight = self.loca(matrix).view(*matrix.shape, 1, 1)
            return self._conv_forward(x, weight, self.bias)  # type: ignore[operator, no-any-return]
        result = self._without_updates(x)
        term = self._term(self, x.movedim(1, -1), result.shape[1])
        return result + term.movedim(-1, 1).to(result.dtype)

    def _matrix(self) -> Tensor | None:
        """Return W as a matrix (p, q) in the same memory.

        As long as the weight is the same object, so is the matrix, so that sums with it can be cached.
        """
        weight: Any = self._parameters.get("weight")
        if torch.compiler.is_compiling() or functional_only() or traced() or weight.requires_grad:
            return as_matrix(weight)
        known = self.__dict__.get("_loca_matrix")
        if known is None or known[0] is not weight or _memory(known[1]) != _memory(weight):
            with ordinary_tensors():
                known = weight, as_matrix(weight)
            if known[1] is not None:
                self.__dict__["_loca_matrix"] = known
        return known[1]

    def kept_state(self) -> dict[str, Any]:
        return {key: value for key, value in super().kept_state().items() if key != "_loca_matrix"}

    @once_while_traced
    def _settle(self) -> None:
        matrix = as_matrix(self._parameters.get("weight"))
        if matrix is not None:
            self.loca.settle(matrix)
