"""Convert a node of a YAML file strictly to a field's type, or explain in a sentence what is wrong."""

from __future__ import annotations

import math
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from loca_vision.messages import nearest

_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,300})")
_NUMBER = re.compile(r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_NO_NUMBER = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_NOTHING = object()
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path", type(None): "null"}


def scalar(text: str) -> Any:
    """Return the value of a plain scalar, by the core schema of YAML 1.2; a number that is too large stays a text."""
    lower = text.lower()
    if text in (lower, text.capitalize(), text.upper()):
        if lower in _WORDS:
            return _WORDS[lower]
        if lower in _NO_NUMBER:
            return _NO_NUMBER[lower]
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) and math.isfinite(float(text)) else text


def value_of(node: Any, kind: Any) -> Any:
    """Convert a node to a field's type.

    Raises:
        ValueError: it is not such a value; the error states the rule.
    """
    kinds = _kinds(kind)
    for one in kinds:
        read = _of_one_kind(node, one)
        if read is not _NOTHING:
            return read
    choices = [choice for one in kinds if get_origin(one) is Literal for choice in get_args(one)]
    close = nearest(node.value, map(str, choices)) if choices and node.id == "scalar" else ""
    quotes = "; a text that looks like something else stands in quotes" if _looks_otherwise(node, kinds) else ""
    raise ValueError(f"expected {' or '.join(map(_described, kinds))}{close or quotes}")


def value_of_text(text: str, kind: Any) -> Any:
    """Convert a text, as on a command line, to a type; as in a file, except that texts need no quotes.

    Raises:
        ValueError: it is not such a value; the error states the rule.
    """
    import yaml

    if kind is str:
        return text
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    return value_of(yaml.ScalarNode("tag:yaml.org,2002:str", text, style="'") if node is None else node, kind)


def _kinds(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _of_one_kind(node: Any, kind: Any) -> Any:
    """Return the value, or `_NOTHING` if it is of another kind."""
    if get_origin(kind) is tuple:
        if node.id != "sequence":
            return _NOTHING
        items = tuple(_of_one_kind(item, get_args(kind)[0]) for item in node.value)
        return _NOTHING if any(item is _NOTHING for item in items) else items
    if node.id != "scalar":
        return _NOTHING
    value = node.value if node.style else scalar(node.value)
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if type(choice) is type(value) and choice == value), _NOTHING)
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and type(value) is str:
        return Path(value)
    return value if type(value) is kind else _NOTHING


def _looks_otherwise(node: Any, kinds: tuple[Any, ...]) -> bool:
    return (
        node.id == "scalar" and not node.style and not isinstance(scalar(node.value), str) and not {str, Path}.isdisjoint(kinds)
    )


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list, each of it {_described(get_args(kind)[0])}"
    return _KINDS.get(kind, str(kind))


def shown(node: Any) -> str:
    """Return a value as written in the file, short enough for one line."""
    if node.id != "scalar":
        return "a list" if node.id == "sequence" else "a table"
    text = repr(node.value) if node.style else ascii(node.value)[1:-1]
    return text if len(text) <= 80 else f"{text[:80]}..."
