"""Text for users: aligned tables, suggestions of similar names, and errors on one line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from itertools import islice


def aligned(rows: Sequence[Sequence[str]], justify: Callable[[str, int], str]) -> str:
    """Format rows of cells as lines, with each column as wide as its widest cell; `justify` is `str.ljust` or `str.rjust`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(justify, row, widths)).rstrip() for row in rows)


def nearest(name: object, known: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown name, which suggests similar known names, or "".

    Comparing takes time, and names in a file may be hostile, so only 2000 names of at most 200 characters are considered.
    """
    candidates = sorted(candidate for candidate in islice(known, 2000) if len(candidate) <= 200)
    close = difflib.get_close_matches(str(name)[:200], candidates, n=3)
    return f"; perhaps {' or '.join(close)}" if close else ""


def one_line(error: object, longest: int | None = None) -> str:
    """Return the text of an error, or of anything else, on one line, cut to `longest` characters."""
    return " ".join(str(error).split())[:longest]
