"""Settings of a model that apply to all of its adapters, such as low memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

_SETTINGS = "_loca_settings"


@dataclass(frozen=True)
class Settings:
    """The settings chosen for a model, independent of any adapter.

    Args:
        max_components: the number of components to reserve in every spectrum for adapters that will be swapped in.
        low_memory: whether to apply updates to activations instead of building weights for them.
    """

    max_components: int | None = None
    low_memory: bool = False


def settings_of(model: nn.Module) -> Settings:
    found: Settings = model.__dict__.get(_SETTINGS, Settings())
    return found


def choose(model: nn.Module, **settings: Any) -> None:
    """Change some of the model's settings; settings that are all at their defaults are not stored."""
    model.__dict__[_SETTINGS] = replace(settings_of(model), **settings)
    if settings_of(model) == Settings():
        del model.__dict__[_SETTINGS]
