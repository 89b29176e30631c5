"""Tell whether tensors still have the values that something was computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook


class Snapshot:
    """The values of tensors at one moment, to tell later whether they have changed.

    Versions reveal every in-place change except those through `.data`, which peft uses when it merges. On the CPU, where it
    costs microseconds and no synchronisation, values are compared as well.

    Args:
        values: the tensors; holding them keeps their memory from being reused.
        compared: those, or parts of them, whose values are compared if they are on the CPU.
    """

    def __init__(self, values: Sequence[Tensor | None], compared: Sequence[Tensor]) -> None:
        self.values = list(values)
        self.marks = [_mark(value) for value in values]
        self.samples = [value.clone() for value in _at_hand(compared)]

    def holds_for(self, values: Sequence[Tensor | None], compared: Sequence[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        return (
            len(self.values) == len(values)
            and all(old is new for old, new in zip(self.values, values, strict=True))
            and self.marks == [_mark(value) for value in values]
            and all(map(torch.equal, self.samples, _at_hand(compared)))
        )


def _at_hand(compared: Sequence[Tensor]) -> list[Tensor]:
    return [value.detach() for value in compared if value.device.type == "cpu"]


def _mark(tensor: Tensor | None) -> tuple[Any, ...]:
    if tensor is None:
        return ()
    step = last_unseen_step() if tensor.requires_grad else None
    return version_of(tensor), step, tensor.data_ptr(), tensor.dtype, tensor.device


def version_of(tensor: Tensor) -> int:
    """Return a number that changes on every write to the tensor; 0 for an inference tensor, which has no versions."""
    return 0 if tensor.is_inference() else tensor._version


class _Step:
    """A step of an optimiser.

    This is an object instead of a number, because torch 2.11 recompiles a compiled optimiser that counts at every step.
    """


def last_unseen_step() -> _Step:
    """Return the last step of any optimiser whose kernels write parameters without a new version."""
    return _last_unseen


_last_unseen = _Step()


def _note_step(optimizer: Optimizer, *inputs: Any) -> None:
    """Record a step of an optimiser that may not update versions: torch's fused ones, and those of other libraries."""
    global _last_unseen
    foreign = not type(optimizer).__module__.startswith("torch.optim.")
    if foreign or any(group.get("fused") for group in optimizer.param_groups):
        _last_unseen = _Step()


register_optimizer_step_post_hook(_note_step)
