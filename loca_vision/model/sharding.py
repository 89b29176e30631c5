"""Models whose parameters are sharded over processes by FSDP 2, `fully_shard`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loca_vision.layers.targets import canonical
from loca_vision.methods.update import Update


def is_shard(tensor: Tensor) -> bool:
    """Whether each process holds only a part of the tensor."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # if it is not imported, there is no such tensor
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(model: nn.Module) -> bool:
    """Whether the model is sharded over processes, even if a part that has just been called is whole at the moment."""
    kind = _kind_of_modules()
    return any(is_shard(p) for p in model.parameters()) or any(
        kind is not None and isinstance(m, kind) for m in model.modules()
    )


def _kind_of_modules() -> Any:
    """Return the class that `fully_shard` mixes into a module's own class, or None if it is not imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole tensor; for a shard, all processes must call this."""
    shard: Any = tensor
    return shard.full_tensor() if is_shard(tensor) else tensor


def check_sharding(model: nn.Module) -> bool:
    """Whether the model is sharded, with all of its trainable parameters.

    Raises:
        ValueError: the model uses FSDP 1, or some trainable parameters are not sharded, so that their gradients would not
            reach other processes.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise ValueError("adapters cannot train in a model in FullyShardedDataParallel: use fully_shard, which is FSDP 2")
    learned = {canonical(name): p for name, p in model.named_parameters() if p.requires_grad} if is_sharded(model) else {}
    whole = next((name for name, parameter in learned.items() if not is_shard(parameter)), None)
    if whole is not None:
        raise ValueError(
            f"{whole} is not sharded, and other parameters are: call fully_shard on the whole model, too, after inject and "
            "before any call of the model"
        )
    return bool(learned)


def class_name(model: nn.Module) -> str:
    """Return the name of the model's original class, which `fully_shard` replaces with one of its own."""
    kind = _kind_of_modules()
    return next(cls.__name__ for cls in type(model).__mro__ if kind is None or not issubclass(cls, kind))


def _share_out(model: nn.Module) -> None:
    """Reshard all parts of a model that are whole at the moment; otherwise `state_dict()` of an update would do so half-way."""
    kind = _kind_of_modules()
    for module in model.modules() if kind is not None else ():
        if isinstance(module, kind):
            module.reshard()


class Values:
    """The values of a model's tensors, taken from a state dict if it has them and gathered from the tensors otherwise.

    Args:
        model: the model.
        state: a state dict of the model, from which a single process can read the values of shards.
    """

    def __init__(self, model: nn.Module, state: Mapping[str, Tensor] | None = None) -> None:
        _share_out(model)
        self._state = {canonical(key): value for key, value in (state or {}).items()}
        named = chain(model.named_parameters(), model.named_buffers()) if self._state else ()
        self._names = {id(tensor): canonical(name) for name, tensor in named}

    def at(self, key: str | None, tensor: Tensor) -> Tensor:
        """Return the value of the tensor at this key of the model."""
        with torch.no_grad():
            value = self._state.get(key or "")
            return gathered(tensor).detach() if value is None else value.detach().to(tensor.dtype)

    def of(self, update: Update) -> Update:
        """Return an update with these values, which is `update` itself if it already holds them."""
        placed = [(tensor, self._names.get(id(tensor))) for tensor in update.tensors()]
        elsewhere = [(tensor, key) for tensor, key in placed if is_shard(tensor) or key in self._state]
        if not elsewhere:
            return update
        whole = {id(tensor): self._like(tensor, key) for tensor, key in elsewhere}
        return copy.deepcopy(update, dict(whole))  # the tensors in the memo count as already copied

    def _like(self, tensor: Tensor, key: str | None) -> Tensor:
        value = self.at(key, tensor)
        return nn.Parameter(value, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


@contextmanager
def one_writer(model: nn.Module) -> Iterator[bool]:
    """Yield whether this process writes a file of the model; if it is sharded, the first process does and the others wait."""
    if not is_sharded(model):
        yield True
        return
    try:
        yield dist.get_rank() == 0
    finally:
        dist.barrier()


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise if the model is sharded: new parameters would be whole, and each process would train its own."""
    if is_sharded(model):
        raise ValueError(f"the model is sharded by fully_shard: {what} before that")
