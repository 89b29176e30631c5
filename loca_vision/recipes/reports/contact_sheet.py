"""Many pictures as one: a grid with a name above every column and next to every row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

_LEAST = 128  # pixels a side; in smaller cells a picture would be hard to make out
_PAPER, _INK, _GREY, _EMPTY = "white", "#222222", "#666666", "#f3f3f3"

Row = Sequence[Image.Image | None]


def contact_sheet(
    rows: Sequence[Row],
    *,
    columns: Sequence[str],
    labels: Sequence[str] = (),
    captions: Sequence[Sequence[str]] | None = None,
    side: int | None = None,
) -> Image.Image:
    """Draw a grid of pictures on white, RGB. All text is wrapped to lines that fit.

    A picture smaller than its cell is enlarged pixel by pixel, without smoothing; a larger one is reduced.

    Args:
        rows: pictures of any size; None leaves a cell empty.
        columns: the heading of each column.
        labels: the text to the left of each row; none at all, or one for each.
        captions: the text under each picture; for each row as many as columns.
        side: side of a cell in pixels, from 32 up. By default that of the largest picture, and at least 128; if all pictures
            have one size below that, the next multiple of it.

    Raises:
        ValueError: there is no row or column, the pictures in a row are not as many as the columns, the numbers of labels or
            captions do not match, or the side is below 32.
    """
    _check(rows, columns, labels, captions, side)
    cell = side or _side_for([picture for row in rows for picture in row if picture is not None])
    return _Sheet(cell).drawn(rows, columns, labels, captions)


def _check(
    rows: Sequence[Row],
    columns: Sequence[str],
    labels: Sequence[str],
    captions: Sequence[Sequence[str]] | None,
    side: int | None,
) -> None:
    if not rows or not columns:
        raise ValueError(f"a contact sheet of {len(rows)} rows and {len(columns)} columns: there is nothing to show")
    if labels and len(labels) != len(rows):
        raise ValueError(f"labels: {len(labels)} of them for {len(rows)} rows")
    if captions is not None and len(captions) != len(rows):
        raise ValueError(f"captions: {len(captions)} of them for {len(rows)} rows")
    for what, given in (("rows", rows), ("captions", captions or ())):
        for number, row in enumerate(given):
            if len(row) != len(columns):
                raise ValueError(f"{what}[{number}]: it has {len(row)} cells, and there are {len(columns)} columns")
    if side is not None and side < 32:
        raise ValueError(f"side={side!r}: a cell has at least 32 pixels a side")


def _side_for(pictures: Sequence[Image.Image]) -> int:
    largest = max((max(picture.size) for picture in pictures), default=_LEAST)
    return largest * -(-_LEAST // largest)


class _Sheet:
    """The measures of a grid, all in proportion to the side of a cell, and the methods that draw it."""

    def __init__(self, cell: int) -> None:
        self.cell = cell
        self.gap = max(6, cell // 24)
        self.font = _font(min(28, max(12, cell // 13)))
        self.small = _font(min(22, max(11, cell // 17)))

    def drawn(
        self, rows: Sequence[Row], columns: Sequence[str], labels: Sequence[str], captions: Sequence[Sequence[str]] | None
    ) -> Image.Image:
        heads = [self._lines(text, self.font) for text in columns]
        under = [[self._lines(text, self.small) for text in row] for row in captions or [[""] * len(columns)] * len(rows)]
        left = self.gap + (self.cell + self.gap if labels else 0)
        top = 2 * self.gap + self._height(heads, self.font)
        tall = [self.cell + self.gap + self._height(row, self.small) for row in under]
        sheet = Image.new("RGB", (left + len(columns) * (self.cell + self.gap), top + sum(tall)), _PAPER)
        draw = ImageDraw.Draw(sheet)
        across = [left + number * (self.cell + self.gap) for number in range(len(columns))]
        for x, lines in zip(across, heads, strict=True):  # close above their pictures
            self._write(draw, (x, top - self.gap // 2 - self._height([lines], self.font)), lines, self.font, _INK)
        for number, row in enumerate(rows):
            y = top + sum(tall[:number])
            if labels:
                fitting = self._lines(labels[number], self.font, self.cell // _line(self.font))
                self._write(draw, (self.gap, y), fitting, self.font, _INK)
            for x, picture, lines in zip(across, row, under[number], strict=True):
                self._place(sheet, picture, (x, y))
                self._write(draw, (x, y + self.cell + self.gap // 4), lines, self.small, _GREY)
        return sheet

    def _place(self, sheet: Image.Image, picture: Image.Image | None, at: tuple[int, int]) -> None:
        """Put a picture in the middle of its cell, in its own proportions."""
        if picture is None:
            sheet.paste(_EMPTY, (*at, at[0] + self.cell, at[1] + self.cell))
            return
        factor = self.cell / max(picture.size)
        width, height = (max(1, round(side * factor)) for side in picture.size)
        way = Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS
        fitting = picture.convert("RGB").resize((width, height), way)
        sheet.paste(fitting, (at[0] + (self.cell - width) // 2, at[1] + (self.cell - height) // 2))

    def _write(
        self, draw: ImageDraw.ImageDraw, at: tuple[int, int], lines: Sequence[str], font: ImageFont.FreeTypeFont, ink: str
    ) -> None:
        for number, text in enumerate(lines):
            draw.text((at[0], at[1] + number * _line(font)), text, fill=ink, font=font)

    def _height(self, texts: Sequence[Sequence[str]], font: ImageFont.FreeTypeFont) -> int:
        return max(map(len, texts)) * _line(font)

    def _lines(self, text: str, font: ImageFont.FreeTypeFont, most: int = 6) -> list[str]:
        """Return the text in lines as wide as a cell; text that does not fit ends in an ellipsis."""
        lines = [line for part in text.splitlines() for line in _wrapped(part, font, self.cell)]
        if len(lines) <= most:
            return lines
        last = lines[most - 1]
        while last and font.getlength(f"{last}…") > self.cell:
            last = last[:-1]
        return [*lines[: most - 1], f"{last}…"]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return the font that comes with matplotlib, which also has Greek and Cyrillic."""
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _line(font: ImageFont.FreeTypeFont) -> int:
    """Return the height of a line in pixels."""
    return sum(font.getmetrics())


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Return lines of whole words, except for words that are wider than a line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]
