"""Tables for a terminal."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence


def aligned(rows: Sequence[Sequence[str]], justify: Callable[[str, int], str]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell; `justify` is `str.ljust` or `str.rjust`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(justify, row, widths)).rstrip() for row in rows)


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown name: the known ones that look like it, or nothing."""
    close = difflib.get_close_matches(str(name), sorted(known), n=3)
    return f"; perhaps {' or '.join(close)}" if close else ""
