"""Read the query of a request, such as `?seed=3&steps=20`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loca_vision.messages import nearest, one_line
from refusals import Refusal


class Options:
    """Options by name. Each is read once, and those left at the end are unknown.

    Args:
        pairs: the names and values in the query.

    Raises:
        Refusal: a name appears twice.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        self._left = dict(pairs)
        self._asked: list[str] = []
        if len(self._left) < len(pairs):
            raise Refusal(400, "an option comes twice in the query")

    def text(self, name: str, longest: int) -> str:
        """Return the text of a required option.

        Raises:
            Refusal: the option is missing, empty, or longer than `longest` characters.
        """
        value = self._take(name) or ""
        if not value.strip() or len(value) > longest:
            raise Refusal(400, f"{name}: expected a text of 1 to {longest} characters, got {len(value)}")
        return value

    def count(self, name: str, default: int, *, least: int = 1, most: int) -> int:
        """Return a whole number.

        Raises:
            Refusal: the value is not a whole number, or out of range.
        """
        value = self._take(name)
        if value is None:
            return default
        number = int(value) if value.isascii() and value.isdigit() and len(value) <= 20 else -1
        if not least <= number <= most:
            raise Refusal(400, f"{name}={_shown(value)}: expected a whole number from {least} to {most}")
        return number

    def number(self, name: str, default: float, *, least: float, most: float) -> float:
        """Return a finite number.

        Raises:
            Refusal: the value is not a number, or out of range.
        """
        value = self._take(name)
        if value is None:
            return default
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise Refusal(400, f"{name}={_shown(value)}: expected a number from {least:g} to {most:g}")
        return number

    def finish(self) -> None:
        """Check that all options were read.

        Raises:
            Refusal: there is an unknown option.
        """
        for name in self._left:
            raise Refusal(400, f"there is no option {_shown(name)}{nearest(name, self._asked)}")

    def _take(self, name: str) -> str | None:
        self._asked.append(name)
        return self._left.pop(name, None)


def _shown(value: str) -> str:
    return one_line(repr(value), 80)
