"""Modules of transformers' image models and text encoders that version 5 renamed; files may have either name."""

from __future__ import annotations

import re
from collections.abc import Iterable

_FORMERLY = (
    (r"\bencoder\.layer\.(\d+)\.", r"layers.\1."),
    (r"\battention\.(?:attention|self)\.(query|key|value)\b", lambda match: f"attention.{match[1][0]}_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"(?<!attention\.)\boutput\.dense\b", "mlp.fc2"),
    (r"^text_model\.", ""),
)
_MAX_NAME = 500


def similar(name: str) -> str:
    """Map all names that transformers has had for a parameter or module to one; other names, and overlong ones, stay."""
    if len(name) > _MAX_NAME:
        return name
    component, dot, rest = name.partition(".")
    if not component.startswith("text_encoder"):
        component, dot, rest = "", "", name
    for former, present in _FORMERLY:
        rest = re.sub(former, present, rest)
    return component + dot + rest


class Spelling:
    """How a known model spells the names of its modules.

    Args:
        modules: the model's names; if there are none, every name is left as it is.
    """

    def __init__(self, modules: Iterable[str] = ()) -> None:
        self._own = set(modules)
        self._by_similar: dict[str, list[str]] = {}
        for module in self._own:
            self._by_similar.setdefault(similar(module), []).append(module)

    def of(self, module: str) -> str:
        """Return the model's name of a module that a file may have under another one."""
        found = [] if module in self._own else self._by_similar.get(similar(module), [])
        return found[0] if len(found) == 1 else module

    def of_parameter(self, name: str) -> str:
        """Do the same for a parameter's name."""
        module, dot, parameter = name.rpartition(".")
        return self.of(module) + dot + parameter
