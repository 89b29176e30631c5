"""Which program transform, if any, watches the code that runs now: compilation, export, tracing, torch.func."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

# From torch 2.7 on. The flag, not the function that tells it: torch.compile before 2.14 takes the answer of that for True.
_HAS_FLAG = hasattr(torch.compiler, "_is_exporting_flag")


def exported() -> bool:
    """Whether torch.export traces this code: what it finds in the model must be there unchanged afterwards."""
    if _HAS_FLAG:
        return torch.compiler._is_exporting_flag
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def compiled() -> bool:
    """Whether torch.compile traces this code."""
    return torch.compiler.is_compiling() and not exported()


def functional_only() -> bool:
    """Whether only ordinary, out-of-place tensor operations may be used, with no operator or cache of our own.

    That is so under torch.export, whose programs run where this library is not installed, and under torch.func and
    forward-mode differentiation, which transform every operation.
    """
    return exported() if torch.compiler.is_compiling() else transformed()


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation watches this code."""
    return bool(torch._C._are_functorch_transforms_active()) or torch.autograd.forward_ad._current_level >= 0


def traced() -> bool:
    """Whether torch.jit.trace, or `torch.onnx.export(dynamo=False)`, records this code; with `dynamo=True` it is `exported`."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


@contextmanager
def untraced() -> Iterator[None]:
    """Inside, torch.jit.trace records nothing: what is computed becomes a constant of the trace."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Inside, new tensors record no history and are not inference tensors, whatever mode the caller is in.

    What is made in inference mode could never be trained, nor written to outside of it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


class _FirstOrder(torch.autograd.Function):
    """A gradient whose own derivative is refused in a sentence."""

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
    """For the `backward` of an autograd function that has no second derivative."""

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
