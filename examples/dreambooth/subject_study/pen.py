"""A pen for shapes that are placed, rotated and mirrored: flat with dark outlines, or only outlines in crayon or neon."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import ImageDraw

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]
Style = Literal["paint", "crayon", "neon"]

INK: Colour = (44, 38, 58)
GROUNDS: dict[Style, Colour] = {"crayon": (250, 246, 232), "neon": (16, 12, 34)}  # of styles that fill no shapes
_EDGE = 0.09  # width of an outline, as a share of half the object's side


@dataclass(frozen=True)
class Pen:
    """Draws in an object's own coordinates, in which it roughly fills the square from -1 to 1, with y pointing down.

    Args:
        canvas: the canvas, with more pixels than the final picture.
        at: the object's centre, in pixels.
        size: half the object's side, in pixels.
        angle: the object's rotation in degrees, clockwise, before it is mirrored.
        mirrored: whether left and right are swapped.
        style: "paint" fills shapes and inks their borders; the other styles draw borders in the colour of the shape.
    """

    canvas: ImageDraw.ImageDraw
    at: tuple[float, float]
    size: float
    angle: float = 0.0
    mirrored: bool = False
    style: Style = "paint"

    def shape(self, points: Points, fill: Colour, edge: Colour | None = INK) -> None:
        """Draw a closed shape; with `edge=None`, its border is not drawn in the style "paint"."""
        placed = self._placed(points)
        self.canvas.polygon(placed, fill=GROUNDS.get(self.style, fill))
        stroke = edge if self.style == "paint" else self._inked(fill)
        if stroke is not None:
            self._stroke([*placed, *placed[:2]], stroke, _EDGE)

    def oval(self, middle: tuple[float, float], across: float, down: float, fill: Colour, edge: Colour | None = INK) -> None:
        """Draw an ellipse, given its centre and its two semi-axes."""
        self.shape(arc(middle, across, down, 0, 360), fill, edge)

    def line(self, points: Points, colour: Colour = INK, width: float = _EDGE) -> None:
        """Draw an open line."""
        self._stroke(self._placed(points), self._inked(colour), width)

    def dot(self, middle: tuple[float, float], radius: float, colour: Colour = INK) -> None:
        """Draw a disc without an outline."""
        self.canvas.polygon(self._placed(arc(middle, radius, radius, 0, 360)), fill=self._inked(colour))

    def _inked(self, colour: Colour) -> Colour:
        """Return the colour of a line in the pen's style."""
        return {"paint": colour, "crayon": waxen(colour), "neon": glowing(colour)}[self.style]

    def _placed(self, points: Points) -> list[tuple[float, float]]:
        turn = math.radians(self.angle)
        cosine, sine = math.cos(turn) * self.size, math.sin(turn) * self.size
        flip = -1 if self.mirrored else 1
        return [(self.at[0] + flip * (x * cosine - y * sine), self.at[1] + x * sine + y * cosine) for x, y in points]

    def _stroke(self, placed: Points, colour: Colour, width: float) -> None:
        self.canvas.line(list(placed), fill=colour, width=max(1, round(width * self.size)), joint="curve")


def arc(middle: tuple[float, float], across: float, down: float, start: float, end: float) -> list[tuple[float, float]]:
    """Return points of an ellipse from one angle to another, in degrees clockwise from the right."""
    angles = [math.radians(start + (end - start) * number / 36) for number in range(37)]
    return [(middle[0] + across * math.cos(angle), middle[1] + down * math.sin(angle)) for angle in angles]


def darker(colour: Colour, factor: float = 0.75) -> Colour:
    """Return the colour with each component multiplied by this factor."""
    red, green, blue = (round(value * factor) for value in colour)
    return red, green, blue


def waxen(colour: Colour) -> Colour:
    """Return the colour as a crayon draws it on paper: darker, and greys nearly black."""
    return darker(colour, 0.8) if max(colour) - min(colour) >= 40 else INK


def glowing(colour: Colour) -> Colour:
    """Return the colour as bright as a neon tube: its weakest component dark, its strongest full; greys become cyan."""
    least, most = min(colour), max(colour)
    if most - least < 40:
        return 90, 255, 240
    red, green, blue = (round(50 + 205 * (value - least) / (most - least)) for value in colour)
    return red, green, blue
