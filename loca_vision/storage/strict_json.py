"""Read JSON strictly: no repeated keys, NaN, infinity or absurd nesting."""

from __future__ import annotations

import json
import math
import stat
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from loca_vision.storage.atomic_file import refuse_nul

MAX_HEADER = 8 * 2**20


def _check_regular(path: Path) -> None:
    refuse_nul(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would hang on opening
        raise ValueError(f"{path}: it is not a regular file")


def _one_line(text: str) -> str:
    """Make a text safe for a terminal and a log, whatever names a file contains."""
    text = text if len(text) <= 600 else f"{text[:300]} ... {text[-300:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def strict_json(text: str, *, longest: int = 32, nesting: int = 8) -> Any:
    """Return the value of a JSON text without repeated keys, NaN, infinity, absurd numbers or absurd nesting.

    Args:
        text: the JSON text.
        longest: the maximal number of characters of a number.
        nesting: the maximal depth of nested dicts and lists.

    Raises:
        ValueError: the text is not such JSON.
    """
    number = partial(_number, longest=longest)
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_int=number, parse_float=number, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    _check_nesting(value, nesting)
    return value


def read_json(path: Path) -> Any:
    """Return the value of a JSON file of at most 8 MiB, read as strictly as by `strict_json`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a regular file, or not such JSON; the message begins with the path.
    """
    _check_regular(path)
    with path.open("rb") as file:
        raw = file.read(MAX_HEADER + 1)
    try:
        if len(raw) > MAX_HEADER:
            raise ValueError(f"it has more than {MAX_HEADER} bytes")
        return strict_json(raw.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {_one_line(str(error))}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the key {name!r} comes twice")
    return table


def _number(text: str, longest: int) -> int | float:
    """Parse a number with limits, because Python reads 1e999 as infinity, and integers of any length."""
    if len(text) <= longest:
        value = int(text) if text.lstrip("-").isdigit() else float(text)
        if isinstance(value, int) or math.isfinite(value):
            return value
    raise ValueError(f"{text[:32]} is too long or too large for a number")


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _check_nesting(value: Any, levels: int) -> None:
    if isinstance(value, (dict, list)):
        if not levels:
            raise ValueError("its JSON is nested too deeply")
        for child in value.values() if isinstance(value, dict) else value:
            _check_nesting(child, levels - 1)
