"""YAML files of settings, read strictly: a flat table of texts, numbers, truths, null, and lists of these.

As in YAML 1.2, and as people mean it, `1e-3` is a number and `no` a text. Nothing else of YAML is read: no tags, no anchors.
"""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_BYTES = 2**20
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]{0,300})")
_NUMBER = re.compile(r"[-+]?(([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)")
_NO_NUMBER = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")  # a text that needs no quotes, if it is no word of YAML
_NOTHING = object()
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path", type(None): "null"}


def read_settings(cls: Any, path: Path) -> dict[str, Any]:
    """The fields of a dataclass that a file sets, each of the field's type.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: another kind of file, or it is wrong; the sentence has file, line, key, rule, and the nearest names.
    """
    types_of = {name: kind for name, kind in get_type_hints(cls).items() if name in cls.__dataclass_fields__}
    values: dict[str, Any] = {}
    for key, node in _table(path, _text(path)):
        place = f"{path}, line {key.start_mark.line + 1}"
        name = key.value
        if name not in types_of or name == "config":
            known = types_of.keys() - {"config"}
            raise ValueError(f"{place}: {name!r} is no setting{nearest(name, known) or f'; there are {_listed(known)}'}")
        if name in values:
            raise ValueError(f"{place}: {name!r} comes twice")
        try:
            values[name] = _value(node, types_of[name])
        except ValueError as error:
            raise ValueError(f"{place}: {name}={_shown(node)}: {error}") from None
    return values


def write_settings(values: Mapping[str, Any]) -> str:
    """The text of a file that `read_settings` reads the same values from."""
    import yaml

    dumper_class: Any = type("Dumper", (yaml.SafeDumper,), {})  # one of its own, as representers are kept on the class

    def quoted(dumper: Any, text: str) -> Any:
        """Quotes for every text that is not plainly one."""
        plain = _PLAIN.fullmatch(text) and isinstance(_scalar(text), str)
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')

    dumper_class.add_representer(str, quoted)
    text: str = yaml.dump(dict(values), Dumper=dumper_class, sort_keys=False, width=10**9, allow_unicode=True)
    return text


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the known ones that look like it, or nothing."""
    close = difflib.get_close_matches(str(name), sorted(known), n=3)
    return f"; perhaps {' or '.join(close)}" if close else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _text(path: Path) -> str:
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r}: a path holds no NUL character")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if not path.is_file():  # a FIFO would hang
        raise ValueError(f"{path}: it is not a regular file")
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ValueError(f"{path}: it has more than {MAX_BYTES} bytes")
        return data.decode("utf-8-sig")
    except OSError as error:
        raise type(error)(f"{path}: it cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8") from None


def _table(path: Path, text: str) -> list[tuple[Any, Any]]:
    """The nodes of keys and values of the one table in a file; none of an empty one."""
    import yaml

    try:
        _check_events(path, yaml.parse(text, Loader=yaml.SafeLoader), yaml)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: it is not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: it is not YAML ({' '.join(str(error).split())})") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: it is not a table of settings, as in `name: value`")
    for key, _ in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{path}, line {key.start_mark.line + 1}: a key is the name of a setting")
    return list(root.value)


def _check_events(path: Path, events: Iterable[Any], yaml: Any) -> None:
    """Before anything is built: these could be large, deep, or objects."""
    depth = documents = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        place = f"{path}, line {event.start_mark.line + 1}"
        if getattr(event, "anchor", None) is not None:
            raise ValueError(f"{place}: anchors and aliases, here {event.anchor!r}, are not read")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{place}: tags, here {event.tag!r}, are not read")
        if depth > 2:
            raise ValueError(f"{place}: settings are not nested")
        if documents > 1:
            raise ValueError(f"{place}: a second document begins; a file of settings has one")


def _scalar(text: str) -> Any:
    """What a plain scalar is, by the core schema of YAML 1.2; a number too large to be one is a text."""
    lower = text.lower()
    if text in (lower, text.capitalize(), text.upper()):
        if lower in _WORDS:
            return _WORDS[lower]
        if lower in _NO_NUMBER:
            return _NO_NUMBER[lower]
    if _WHOLE.fullmatch(text):
        return int(text)
    return float(text) if _NUMBER.fullmatch(text) and math.isfinite(float(text)) else text


def _value(node: Any, kind: Any) -> Any:
    """A node as a value of a field's type.

    Raises:
        ValueError: it is none; the rule.
    """
    kinds = _kinds(kind)
    for one in kinds:
        found = _of_one_kind(node, one)
        if found is not _NOTHING:
            return found
    choices = [choice for one in kinds if get_origin(one) is Literal for choice in get_args(one)]
    close = nearest(node.value, map(str, choices)) if choices and node.id == "scalar" else ""
    quotes = "; a text that looks like something else stands in quotes" if _looks_otherwise(node, kinds) else ""
    raise ValueError(f"it is {' or '.join(map(_described, kinds))}{close or quotes}")


def _kinds(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _of_one_kind(node: Any, kind: Any) -> Any:
    """The value, or `_NOTHING` if it is of another kind."""
    if get_origin(kind) is tuple:
        if node.id != "sequence":
            return _NOTHING
        items = tuple(_of_one_kind(item, get_args(kind)[0]) for item in node.value)
        return _NOTHING if any(item is _NOTHING for item in items) else items
    if node.id != "scalar":
        return _NOTHING
    value = node.value if node.style else _scalar(node.value)
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if type(choice) is type(value) and choice == value), _NOTHING)
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and type(value) is str:
        return Path(value)
    return value if type(value) is kind else _NOTHING


def _looks_otherwise(node: Any, kinds: tuple[Any, ...]) -> bool:
    return (
        node.id == "scalar"
        and not node.style
        and not isinstance(_scalar(node.value), str)
        and not {str, Path}.isdisjoint(kinds)
    )


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list, each of it {_described(get_args(kind)[0])}"
    return _KINDS.get(kind, str(kind))


def _shown(node: Any) -> str:
    """A value as the file has it, short enough for one line."""
    if node.id != "scalar":
        return "a list" if node.id == "sequence" else "a table"
    text = repr(node.value) if node.style else ascii(node.value)[1:-1]
    return text if len(text) <= 80 else f"{text[:80]}..."
