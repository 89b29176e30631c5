"""Trace a training step with LoCA on tensors that have shapes but no memory: count live bytes and operations."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from loca_vision import LoCAConfig, explain, inject
from loca_vision.layers.targets import Target, find_targets
from loca_vision.model.traversal import all_updates
from step_memory_bases import Base

BYTES_OF_A_TRAINED_NUMBER = 16


@dataclass(frozen=True)
class Step:
    """Bytes and operations of a training step.

    Args:
        title, resolution: the title and resolution of the base.
        checkpointing: whether activations are recomputed in the backward pass.
        weights: bytes of the frozen weights.
        built: bytes of the adapted weights.
        trained: the number of trained parameters, including locations.
        kept: bytes kept for the backward pass.
        peak: peak bytes alive in addition to the frozen weights and trained numbers.
        forward, backward: operations of the frozen base, where a multiply-add counts as two.
        added: operations of LoCA, forward and backward.
    """

    title: str
    resolution: int
    checkpointing: bool
    weights: int
    built: int
    trained: int
    kept: int
    peak: int
    forward: float
    backward: float
    added: float

    @property
    def total(self) -> int:
        """Bytes of everything counted."""
        return self.weights + self.built + BYTES_OF_A_TRAINED_NUMBER * self.trained + self.peak


class Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Track the bytes of tensors that operations in this context create, for as long as they are alive.

    Args:
        besides: addresses of storages that do not count.
    """

    def __init__(self, besides: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.besides, self.now, self.peak = besides, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: Any) -> None:
        address = storage._cdata
        if address in self.sizes or address in self.besides:
            return
        self.sizes[address] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self.sizes.pop(address)


@contextmanager
def _bfloat16() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _attention(q: Any, k: Any, v: Any, *_: Any, **more: Any) -> int:
    operations: int = sdpa_flop_count(q, k, v)  # type: ignore[no-untyped-call]
    return operations


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **more: Any) -> int:
    operations: int = sdpa_backward_flop_count(grad, q, k, v)  # type: ignore[no-untyped-call]
    return operations


_ATTENTION = {  # torch counts these only on GPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def traced(
    base: Base, config: LoCAConfig, *, batch_size: int = 1, resolution: int | None = None, checkpointing: bool = False
) -> Step:
    """Trace one training step of one base.

    Args:
        config: the configuration of the adapter.
        batch_size: images per step.
        resolution: pixels per side; by default the base's.
        checkpointing: whether to recompute activations in the backward pass.

    Raises:
        ValueError: the adapter does not fit the base.
    """
    resolution = resolution or base.resolution
    with torch.device("meta"):
        with_loca = base.build()
    inject(with_loca, config)
    with FakeTensorMode():
        with _bfloat16():
            model = base.build().train()
        adapted = find_targets(model, config.targets)
        _learning(adapted)
        if checkpointing:
            model.enable_gradient_checkpointing()  # type: ignore[operator]
        tokens = _watch_tokens(adapted)
        step = partial(_step, model, *base.call(batch_size, resolution))
        kept, peak = _bytes(model, step)  # in a separate step: the operation counter keeps tensors alive
        forward, both = _operations(step)
    return Step(
        base.title,
        resolution,
        checkpointing,
        2 * sum(parameter.numel() for parameter in model.parameters()),
        2 * sum(math.prod(target.shape) for target in adapted),
        sum(p.numel() for one in all_updates(with_loca) for p in (*one.trainable(), *one.location_parameters())),
        kept,
        peak,
        forward,
        both - forward - _of_gradients(adapted, tokens),
        sum(row.forward.flops + row.backward.flops for row in explain(with_loca, dict(tokens))),  # coefficients train
    )


def _step(model: nn.Module, positional: tuple[Any, ...], named: Mapping[str, Any], between: Callable[[], None]) -> None:
    """Run forward and backward, and call `between` in between."""
    with torch.autocast("cpu", torch.bfloat16):
        error = model(*positional, **named).sample.float().square().mean()
    between()
    error.backward()


def _bytes(model: nn.Module, step: Callable[..., None]) -> tuple[int, int]:
    """Return the bytes of tensors alive between forward and backward, and the peak."""
    alive, kept = Alive({parameter.untyped_storage()._cdata for parameter in model.parameters()}), []
    with alive:
        step(lambda: kept.append(alive.now))
    return kept[0], alive.peak


def _operations(step: Callable[..., None]) -> tuple[int, int]:
    """Return the operations of the forward pass, and of both passes."""
    counted: Any = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    forward: list[int] = []
    with counted:
        step(lambda: forward.append(counted.get_total_flops()))
    return forward[0], counted.get_total_flops()


def _learning(adapted: list[Target]) -> None:
    """Request the gradients of adapted weights, from which LoCA computes its own; each is freed at once, as in LoCA."""
    for target in adapted:
        weight: Any = target.layer.weight
        weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))


def _watch_tokens(adapted: list[Target]) -> dict[str, int]:
    """Return the number of vectors that each projection sees, by name; a forward pass fills it in."""
    tokens: dict[str, int] = {}

    def seen(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        tokens[name] = given[0].numel() // given[0].shape[-1]

    for target in adapted:
        target.layer.register_forward_pre_hook(partial(seen, target.name))
    return tokens


def _of_gradients(adapted: list[Target], tokens: Mapping[str, int]) -> int:
    """Return the operations of the products dY^T X, which belong to LoCA; a layer with several projections counts once."""
    layers = {target.layer_path: target for target in adapted}
    weights: dict[str, Any] = {path: target.layer.weight for path, target in layers.items()}
    return sum(2 * tokens[target.name] * int(weights[path].numel()) for path, target in layers.items())
