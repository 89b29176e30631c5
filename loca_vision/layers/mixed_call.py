"""Calls of linear layers in which every sample has its own adapters, in eager and in compiled code."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from loca_vision.functional.transforms import compiled, exported, traced
from loca_vision.layers.mixed_updates import MixedCall
from loca_vision.layers.mixtures import handle_of, mixture_of, owner_of

if TYPE_CHECKING:
    from loca_vision.layers.effective_weight import EffectiveWeight

Base = Callable[[], Tensor]


def may_mix(weight: EffectiveWeight) -> bool:
    """Whether a call of the layer mixes adapters now; in compiled code, whether any call ever has, so that this one may."""
    if weight._loca_handle == 0:
        return False
    if compiled():
        return True
    mixed = mixture_of(weight) is not None
    if mixed:
        refuse_trace()
    return mixed


def refuse_trace() -> None:
    """Raise RuntimeError during a trace or an export, which would fix the adapters of one call for all later calls."""
    if exported() or traced():
        raise RuntimeError(
            "per_sample cannot be exported or traced: do that with a model in which one adapter acts for all samples"
        )


def with_updates_of_call(weight: EffectiveWeight, x: Tensor, result: Tensor, base: Base, *, in_place: bool) -> Tensor:
    """Add each sample's updates to a layer's result without updates; if the call mixes no adapters, add the active ones.

    Args:
        weight: the effective weight of the layer.
        x: the input (..., q) of the layer.
        result: the layer's result (..., n) for x.
        base: returns W.
        in_place: whether the result may be written to.
    """
    if not compiled():
        return _added(weight, x, result, base, in_place)
    if torch.is_grad_enabled():  # the operator does not take the trained parameters as inputs: autograd would not see them
        return _added_outside(weight, x, result, base)
    needs_base = any([update.needs_weight for update in weight.all_updates()])
    term: Tensor = _mixed_call(x, base() if needs_base else None, result.shape[-1], weight._loca_handle)
    return result + term.to(result.dtype)


def _added(weight: EffectiveWeight, x: Tensor, result: Tensor, base: Base, in_place: bool) -> Tensor:
    mixture = mixture_of(weight)
    if mixture is None:
        return result + weight.applied(x, result.shape[-1], keep=True, base=base).to(result.dtype)
    parts = [(handle_of(part), where) for part, where in weight.stacked()]
    for handle, _ in parts:
        mixture.note(handle, x)
    return MixedCall(mixture, parts, weight.call_settings.scale, base).added(result, x, in_place=in_place)


@_disable_dynamo
def _added_outside(weight: EffectiveWeight, x: Tensor, result: Tensor, base: Base) -> Tensor:
    return _added(weight, x, result, base, False)


def _compute(x: Tensor, weight: Tensor | None, rows: int, handle: int) -> Tensor:
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("per_sample cannot be recorded in a CUDA graph, which would repeat the adapters of one call")
    owner: Any = owner_of(handle)
    return _added(owner, x, x.new_zeros(*x.shape[:-1], rows), lambda: _given(weight), True)


def _given(weight: Tensor | None) -> Tensor:
    if weight is None:
        raise RuntimeError("per_sample: a compiled call has an adapter that depends on W, such as a DoRA, and came later")
    return weight


def operator(name: str, function: Callable[..., Tensor], schema: str) -> Any:
    """Define an operator that compiled code calls as a whole and that inductor leaves out of CUDA graphs.

    Whatever the operator looks up when it runs, such as the adapters of the call, causes no recompilation.
    """
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    tagged = tag is not None and "tags" in inspect.signature(torch.library.custom_op).parameters
    more: dict[str, Any] = {"tags": (tag,)} if tagged else {}
    return torch.library.custom_op(f"loca_vision::{name}", function, mutates_args=(), schema=schema, **more)


_mixed_call = operator("mixed_call", _compute, "(Tensor x, Tensor? weight, int rows, int handle) -> Tensor")


@_mixed_call.register_fake
def _(x, weight, rows, handle):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], rows)
