"""Settings of a model that concern all of its adapters, such as low memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

_SETTINGS = "_loca_settings"


@dataclass(frozen=True)
class Settings:
    """What was chosen for a model before and beyond any adapter.

    Args:
        max_components: room in every spectrum for the adapters that are to be swapped in.
        low_memory: apply updates to activations instead of building weights for them.
    """

    max_components: int | None = None
    low_memory: bool = False


def settings_of(model: nn.Module) -> Settings:
    found: Settings = model.__dict__.get(_SETTINGS, Settings())
    return found


def choose(model: nn.Module, **settings: Any) -> None:
    """Change some of them; those of a model that is as usual are not kept."""
    model.__dict__[_SETTINGS] = replace(settings_of(model), **settings)
    if settings_of(model) == Settings():
        del model.__dict__[_SETTINGS]
