"""The fields of a settings dataclass: the text under each, and the groups that they are in."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Group:
    """Settings that belong together.

    Args:
        title: one line.
        fields: the fields, in the order of the dataclass.
    """

    title: str
    fields: tuple[dataclasses.Field[Any], ...]


def field_texts(cls: type[Any]) -> dict[str, str]:
    """Return the text under each field of a dataclass or its bases, on one line, by name; a subclass's text wins.

    Fields without a text are left out, as are all fields of a class whose source is not installed.
    """
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _own_texts(base)
    return texts


def groups_of(cls: type[Any]) -> list[Group]:
    """Group the fields by the class that first declares them, from the bases down; its docstring's first line is the title."""
    declared: dict[str, type[Any]] = {}
    for base in reversed(cls.__mro__):
        for name in inspect.get_annotations(base):
            declared.setdefault(name, base)
    members: dict[type[Any], list[dataclasses.Field[Any]]] = {}
    for field in dataclasses.fields(cls):
        members.setdefault(declared[field.name], []).append(field)
    own = "Settings" if members.keys() == {cls} else "Other settings"
    return [Group(own if base is cls else first_line(base), tuple(fields)) for base, fields in members.items()]


def first_line(cls: type[Any]) -> str:
    """Return the first line of a class's docstring, without the full stop."""
    return (inspect.cleandoc(cls.__doc__ or "") or cls.__name__).splitlines()[0].rstrip(".")


def _own_texts(cls: type[Any]) -> dict[str, str]:
    try:
        source = inspect.getsource(cls)
    except OSError:
        return {}
    body = ast.parse(textwrap.dedent(source)).body[0].body  # type: ignore[attr-defined]
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and _is_text(text)
    }


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
