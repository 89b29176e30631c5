"""Look up a method's title and settings by its name."""

from __future__ import annotations

import dataclasses

from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.registry import KINDS

COMMON = ("targets", "layers", "seed")
"""The fields that all methods have; trainers set them in the same way for every method."""


def title_of(method: str) -> str:
    """Return the method's title as it is written in sentences, or its name if it has no title or is unknown."""
    config = KINDS.get(method)
    return (config.title if config else "") or method


def setting_fields(config: type[AdapterConfig]) -> dict[str, dataclasses.Field[object]]:
    """Return the fields of a method that the user of a trainer may set, by name, without those common to all methods."""
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    names = [name for name in fields if name not in COMMON] if config.settings is None else config.settings
    return {name: fields[name] for name in names}
