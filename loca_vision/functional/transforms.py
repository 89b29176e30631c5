"""Find out which program transform, if any, is active: compilation, export, tracing or torch.func."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# Available since torch 2.7. The flag is used rather than the function that returns it, because torch.compile before 2.14 treats
# the function's result as True.
_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


def exported() -> bool:
    """Whether torch.export is tracing this code; if so, everything in the model must be unchanged afterwards."""
    if _HAS_FLAG:
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def compiled() -> bool:
    """Whether torch.compile is tracing this code."""
    return torch.compiler.is_compiling() and not exported()


def functional_only() -> bool:
    """Whether only ordinary, out-of-place tensor operations may be used, without custom operators or caches.

    This is the case under torch.export, whose programs run where this library is not installed, and under torch.func and
    forward-mode differentiation, which transform every operation.
    """
    return exported() if torch.compiler.is_compiling() else transformed()


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is active."""
    return bool(torch._C._are_functorch_transforms_active()) or torch.autograd.forward_ad._current_level >= 0


def traced() -> bool:
    """Whether torch.jit.trace or `torch.onnx.export(dynamo=False)` records this code; `dynamo=True` counts as `exported`."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


@contextmanager
def untraced() -> Iterator[None]:
    """Make torch.jit.trace record nothing inside the context, so that results become constants of the trace."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Make new tensors record no history and not be inference tensors inside the context, whatever mode the caller is in.

    Tensors created in inference mode could never be trained, nor written to outside that mode.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class _FirstOrder(torch.autograd.Function):
    """A gradient that raises a clear error when it is differentiated again."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *grads: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "the gradient of an adapted layer cannot be differentiated by backward() again: "
            "take second derivatives with torch.func, such as torch.func.hessian"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the `backward` of an autograd function that has no second derivative."""

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor) -> Any:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return results
        single = isinstance(results, Tensor)
        given = [grad for grad in grads if grad is not None]
        marked = [None if r is None else _FirstOrder.apply(r, *given) for r in ((results,) if single else results)]
        return marked[0] if single else tuple(marked)

    return wrapper
