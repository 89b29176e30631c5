"""YAML files of settings, read strictly: a flat table of texts, numbers, truth values, null, and lists of these.

As in YAML 1.2, and as people expect, `1e-3` is a number and `no` a text. Nothing else of YAML is read: no tags, no anchors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from loca_vision.messages import nearest
from loca_vision.recipes.settings.yaml_value import scalar, shown, value_of

MAX_BYTES = 2**20
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_./-]*")  # a text that needs no quotes, unless YAML reads it as another value


def read_settings(cls: Any, path: Path) -> dict[str, Any]:
    """Return the fields of a dataclass that a file sets, each of the field's type.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a YAML file, or it is wrong; the error has file, line, key, rule, and the nearest names.
    """
    kinds = get_type_hints(cls)
    types_of = {field.name: kinds[field.name] for field in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for key, node in _table(path, _text(path)):
        place = f"{path}, line {key.start_mark.line + 1}"
        name = key.value
        if name not in types_of or name == "config":
            known = types_of.keys() - {"config"}
            raise ValueError(
                f"{place}: {name[:80]!r} is not a setting{nearest(name[:80], known) or f'; there are {_listed(known)}'}"
            )
        if name in values:
            raise ValueError(f"{place}: {name!r} comes twice")
        try:
            values[name] = value_of(node, types_of[name])
        except ValueError as error:
            raise ValueError(f"{place}: {name}={shown(node)}: {error}") from None
    return values


def write_settings(values: Mapping[str, Any]) -> str:
    """Return the text of a file from which `read_settings` reads the same values."""
    import yaml

    dumper_class: Any = type("Dumper", (yaml.SafeDumper,), {})  # a class of our own, because it stores representers

    def quoted(dumper: Any, text: str) -> Any:
        """Quote every text that is not plainly one."""
        plain = _PLAIN.fullmatch(text) and isinstance(scalar(text), str)
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if plain else '"')

    dumper_class.add_representer(str, quoted)
    text: str = yaml.dump(dict(values), Dumper=dumper_class, sort_keys=False, width=10**9, allow_unicode=True)
    return text


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
    """Return the nodes of keys and values of the only table in a file; none for an empty file."""
    import yaml

    try:
        _check_events(path, yaml.parse(text, Loader=yaml.SafeLoader), yaml)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{path}{line}: it is not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: it is not YAML ({' '.join(str(error).split())})") from None
    if root is None or (isinstance(root, yaml.ScalarNode) and not root.style and not root.value):
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{path}: it is not a table of settings, as in `name: value`")
    for key, _ in root.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{path}, line {key.start_mark.line + 1}: expected the name of a setting as the key")
    return list(root.value)


def _check_events(path: Path, events: Iterable[Any], yaml: Any) -> None:
    """Check the events before anything is built from them, since values could be large, deep, or objects."""
    depth = documents = 0
    for event in events:
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        documents += isinstance(event, yaml.DocumentStartEvent)
        place = f"{path}, line {event.start_mark.line + 1}"
        if getattr(event, "anchor", None) is not None:
            raise ValueError(f"{place}: anchors and aliases, here {event.anchor[:80]!r}, are not read")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{place}: tags, here {event.tag[:80]!r}, are not read")
        if depth > 2:
            raise ValueError(f"{place}: settings are not nested")
        if documents > 1:
            raise ValueError(f"{place}: a second document begins; a file of settings has one")
