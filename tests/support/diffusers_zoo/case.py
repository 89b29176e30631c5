"""One model of the zoo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """
    Args:
        config: of the smallest model that its class allows.
        inputs: makes what a call of it takes.
    """

    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape)


def ids(count: int, *shape: int) -> Tensor:
    """Integers below `count`."""
    return torch.randint(count, shape)
