"""Code that must not wait for the accelerator: each wait empties the queue that hides what Python costs.

On CUDA torch itself refuses (`torch.cuda.set_sync_debug_mode`). On the CPU this emulates it: operations whose result the host
has to know, and copies to the host or from a list, are refused by name. Operators of the library's own are looked into.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# Results, or their sizes, that the host has to know.
_WAITING = {
    *("_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim"),
    *("unique_consecutive", "unique_dim_consecutive", "bincount", "histc"),
}
_BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
_TO_THE_HOST = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
_FROM_A_LIST = {torch.tensor, torch.as_tensor, torch.asarray}


class HostWaits(RuntimeError):
    """An operation that synchronises on CUDA."""


@contextmanager
def no_sync(device: torch.device) -> Iterator[None]:
    """Inside, whatever makes the host wait for the device raises."""
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.synchronize(device)
        _refuse("error")
        try:
            yield
        finally:
            _refuse(before)
    elif device.type == "cpu":
        with ExitStack() as modes:
            modes.enter_context(_Functions())
            modes.enter_context(_Operations())
            yield
    else:
        yield  # nobody tells


def _refuse(mode: str | int) -> None:
    """Set torch's own mode, which warns that it does not know of all that waits."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


class _Operations(TorchDispatchMode):
    """What the dispatcher sees, in forward and backward passes alike."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        sized = name == "repeat_interleave" and kwargs.get("output_size") is None
        masked = name in _BY_MASK and any(_is_mask(index) for index in args[1])
        if name in _WAITING or sized or masked:
            raise HostWaits(f"{func} makes the host wait")
        own = OPDEFS.get(func._schema.name)
        if own is None:
            return func(*args, **kwargs)
        with self, torch.no_grad():  # an operator's body runs below this mode
            return own._init_fn(*args, **kwargs)


class _Functions(TorchFunctionMode):
    """What does nothing on the CPU, and so never reaches the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        places = (*args[1:], *kwargs.values()) if func is Tensor.to else ()
        if func in _TO_THE_HOST or any(place in ("cpu",) for place in places if isinstance(place, str)):
            raise HostWaits(f"{getattr(func, '__name__', func)} copies to the host")
        if func in _FROM_A_LIST and kwargs.get("device") not in (None, "cpu") and not isinstance(args[0], Tensor):
            raise HostWaits(f"{func.__name__} copies from the host's pageable memory")
        return func(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
