"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def aligned(rows: Sequence[Sequence[str]], justify: Callable[[str, int], str]) -> str:
    """Rows of cells as lines, each column as wide as its widest cell; `justify` is `str.ljust` or `str.rjust`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(justify, row, widths)).rstrip() for row in rows)
