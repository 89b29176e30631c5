"""A pen that draws flat shapes with dark outlines, placed, turned and mirrored; or the same in neon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import ImageDraw

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

INK: Colour = (44, 38, 58)
NEON_DARK: Colour = (16, 12, 34)
_EDGE = 0.09  # width of an outline, in half sides of what is drawn


@dataclass(frozen=True)
class Pen:
    """Draws in the coordinates of one object, in which it is about the square from -1 to 1, y downwards.

    Args:
        canvas: of pixels, larger than the picture is to be.
        at: where the object's middle is, in pixels.
        size: half of the object's side, in pixels.
        angle: by which the object is turned, in degrees, clockwise.
        mirrored: whether left and right are exchanged.
        neon: draw bright outlines of dark shapes.
    """

    canvas: ImageDraw.ImageDraw
    at: tuple[float, float]
    size: float
    angle: float = 0.0
    mirrored: bool = False
    neon: bool = False

    def shape(self, points: Points, fill: Colour, edge: Colour | None = INK) -> None:
        """A closed shape; without an edge its border is not drawn, except in neon."""
        placed = self._placed(points)
        self.canvas.polygon(placed, fill=NEON_DARK if self.neon else fill)
        stroke = glowing(fill) if self.neon else edge
        if stroke is not None:
            self._stroke([*placed, *placed[:2]], stroke, _EDGE)

    def oval(self, middle: tuple[float, float], across: float, down: float, fill: Colour, edge: Colour | None = INK) -> None:
        """An ellipse by its middle and its two half axes."""
        self.shape(arc(middle, across, down, 0, 360), fill, edge)

    def line(self, points: Points, colour: Colour = INK, width: float = _EDGE) -> None:
        """An open line."""
        self._stroke(self._placed(points), glowing(colour) if self.neon else colour, width)

    def dot(self, middle: tuple[float, float], radius: float, colour: Colour = INK) -> None:
        """A disc without an outline; bright in neon."""
        self.canvas.polygon(self._placed(arc(middle, radius, radius, 0, 360)), fill=glowing(colour) if self.neon else colour)

    def _placed(self, points: Points) -> list[tuple[float, float]]:
        turn = math.radians(self.angle)
        cosine, sine = math.cos(turn) * self.size, math.sin(turn) * self.size
        flip = -1 if self.mirrored else 1
        return [(self.at[0] + flip * (x * cosine - y * sine), self.at[1] + x * sine + y * cosine) for x, y in points]

    def _stroke(self, placed: Points, colour: Colour, width: float) -> None:
        self.canvas.line(list(placed), fill=colour, width=max(1, round(width * self.size)), joint="curve")


def arc(middle: tuple[float, float], across: float, down: float, start: float, end: float) -> list[tuple[float, float]]:
    """Points of an ellipse from one angle to another, in degrees clockwise from the right."""
    angles = [math.radians(start + (end - start) * number / 36) for number in range(37)]
    return [(middle[0] + across * math.cos(angle), middle[1] + down * math.sin(angle)) for angle in angles]


def darker(colour: Colour, factor: float = 0.75) -> Colour:
    """The colour with this share of its light."""
    red, green, blue = (round(value * factor) for value in colour)
    return red, green, blue


def glowing(colour: Colour) -> Colour:
    """As bright and as colourful as a tube of neon: its weakest part dark, its strongest full; greys become cyan."""
    least, most = min(colour), max(colour)
    if most - least < 40:
        return 90, 255, 240
    red, green, blue = (round(50 + 205 * (value - least) / (most - least)) for value in colour)
    return red, green, blue
