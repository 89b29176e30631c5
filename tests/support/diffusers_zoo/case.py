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


def wan_cache() -> Any:
    """What the reference pass of Wan-Animate 2 fills; versions of diffusers before it have none."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    return WanAnimate2KVCache(1)
