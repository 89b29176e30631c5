"""The settings of a call that all updates of a model share: its scale, and low memory."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.functional.transforms import compiled, exported, transformed
from loca_vision.layers.pipeline_call import PipelineCall, announce_settings, current_call

# The scales set in this thread or task, and the pipeline call during which each was set. A mapping is replaced rather than
# changed, because threads that start with a copy of the context share it.
_SET_HERE: ContextVar[Mapping[weakref.ref[CallSettings], tuple[float, PipelineCall | None]]] = ContextVar(
    "loca_scales", default=MappingProxyType({})
)


class CallSettings(nn.Module):
    """How strongly all adapters of a model act in this call, and whether to save memory.

    In eager mode every thread has its own scale. Threads that run compiled code share `scale_tensor`.

    Attributes:
        scale_tensor: the scale of the call, shape (); compiled code reads it, so that changing the scale does not recompile.
        low_memory: whether to apply updates to activations instead of building weights for them.
    """

    scale_tensor: Tensor

    def __init__(self) -> None:
        super().__init__()
        # the scale set last in any thread; None if compiled code set it, which only writes scale_tensor
        self._scale: float | None = 1.0
        self.low_memory = False
        self.register_buffer("scale_tensor", torch.ones((), device="cpu"), persistent=False)

    @property
    def scale(self) -> float:
        """The scale for eager code; 1 in compiled code, which multiplies by `scale_tensor`."""
        if compiled():
            return 1.0
        if self._scale is None:
            return float(self.scale_tensor)
        return self._scale if exported() else self._scale_here(self._scale)

    def _scale_here(self, last: float) -> float:
        """Return the scale that was set in this thread for the current call.

        If the model's `forward` has not been called during the current pipeline call, as with a VAE that only decodes, return
        the scale of that call. In a thread where no scale was set, such as autograd's own threads, which run checkpointed
        blocks again, return `last`, the scale set last in any thread.
        """
        call, found = current_call(), _SET_HERE.get().get(weakref.ref(self))
        if call is not None and (found is None or found[1] is not call):
            return call.scale
        return last if found is None else found[0]

    def set_scale(self, scale: float) -> None:
        if compiled():  # dynamo would treat the number itself as a constant, but not a product with it
            self.scale_tensor.copy_(torch.ones_like(self.scale_tensor) * scale)
            self._scale = None
            return
        self._scale = scale
        if not exported():  # an export would record the write as part of the program
            if not transformed():  # torch.func forbids writing to tensors from outside; compiled code there sets its own
                self.scale_tensor.fill_(scale)
            living = {key: found for key, found in _SET_HERE.get().items() if key() is not None}
            _SET_HERE.set({**living, weakref.ref(self): (scale, current_call())})

    def scaled_in_graph(self, value: Tensor) -> Tensor:
        """Return `value` times the scale in compiled code, and `value` itself in eager code, which has already used `scale`."""
        return value * self.scale_tensor if compiled() else value

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        announce_settings()


class Unscaled(CallSettings):
    """The settings of models whose calls have no scale."""

    @property
    def scale(self) -> float:
        return 1.0
