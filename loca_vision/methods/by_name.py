"""What a method says about itself, by its name."""

from __future__ import annotations

import dataclasses

from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.registry import KINDS

COMMON = ("targets", "layers", "seed")
"""The fields that all methods have, which trainers set for all of them alike."""


def title_of(method: str) -> str:
    """The method as it is written in sentences; its name, where it has no title or is not known here."""
    config = KINDS.get(method)
    return (config.title if config else "") or method


def setting_fields(config: type[AdapterConfig]) -> dict[str, dataclasses.Field[object]]:
    """The fields of a method that a trainer's user may set, by name; those that all have are not among them."""
    fields = {field.name: field for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    names = [name for name in fields if name not in COMMON] if config.settings is None else config.settings
    return {name: fields[name] for name in names}
