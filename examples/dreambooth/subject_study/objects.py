"""Eight kinds of objects, each drawn by a function of a pen and a colour."""

from __future__ import annotations

import math
from collections.abc import Callable

from subject_study.pen import INK, Colour, Pen, arc, darker

WHITE: Colour = (252, 250, 244)
CREAM: Colour = (246, 226, 190)
BROWN: Colour = (140, 92, 60)
ORANGE: Colour = (244, 140, 50)
GOLD: Colour = (255, 208, 64)
NAVY: Colour = (36, 48, 120)


def bands(pen: Pen, middle: tuple[float, float], across: float, down: float) -> None:
    """Draw three dark stripes from top to bottom of an ellipse, given its centre and semi-axes."""
    for offset in (-0.64, 0.0, 0.64):
        x, half = middle[0] + offset * across, down * math.sqrt(1 - offset * offset)
        left, right, top, bottom = x - 0.15 * across, x + 0.15 * across, middle[1] - half, middle[1] + half
        pen.shape([(left, top), (right, top), (right, bottom), (left, bottom)], NAVY, None)


def crowned(pen: Pen, foot: tuple[float, float], half: float) -> None:
    """Draw a golden crown, given the centre of its base and half its width."""
    outline = [(-0.7, 0.0), (-1, -1.2), (-0.45, -0.7), (0, -1.5), (0.45, -0.7), (1, -1.2), (0.7, 0.0)]
    pen.shape([(foot[0] + half * x, foot[1] + half * y) for x, y in outline], GOLD)


def fish(pen: Pen, colour: Colour, stripes: bool = False, crown: bool = False, one_eye: bool = False) -> None:
    """Draw a fish that faces right.

    Args:
        stripes: add dark bands on its body.
        crown: add a golden crown.
        one_eye: give it a huge eye in the middle of its head.
    """
    pen.shape([(-0.5, 0), (-1, -0.5), (-0.86, 0), (-1, 0.5)], darker(colour))
    pen.shape([(-0.3, -0.4), (0, -0.8), (0.3, -0.4)], darker(colour))
    pen.oval((0.08, 0), 0.8, 0.52, colour)
    if stripes:
        bands(pen, (-0.1, 0), 0.56, 0.5)
    if crown:
        crowned(pen, (0.4, -0.42), 0.4)
    if one_eye:
        pen.oval((0.5, -0.06), 0.32, 0.32, WHITE)
        pen.dot((0.56, -0.06), 0.16, (30, 130, 60))
    else:
        pen.oval((0.5, -0.12), 0.16, 0.16, WHITE)
        pen.dot((0.54, -0.12), 0.09)
    pen.line([(0.6, 0.24), (0.72, 0.22), (0.8, 0.14)], width=0.07)


def bird(pen: Pen, colour: Colour) -> None:
    pen.line([(-0.05, 0.6), (-0.05, 1)], BROWN)
    pen.line([(0.2, 0.6), (0.2, 1)], BROWN)
    pen.shape([(-0.5, 0), (-1.05, -0.25), (-0.98, 0.3)], darker(colour))
    pen.shape([(0.72, -0.6), (1.08, -0.42), (0.72, -0.28)], ORANGE)
    pen.oval((0, 0.18), 0.68, 0.54, colour)
    pen.oval((0.44, -0.46), 0.4, 0.4, colour, INK)
    pen.oval((0.3, -0.05), 0.3, 0.26, colour, INK if pen.style == "neon" else None)
    pen.oval((-0.16, 0.16), 0.38, 0.24, darker(colour))
    pen.oval((0.54, -0.52), 0.14, 0.14, WHITE)
    pen.dot((0.57, -0.52), 0.08)


def cat(pen: Pen, colour: Colour) -> None:
    pen.line([(0.4, 0.8), (0.85, 0.7), (0.95, 0.3), (0.8, 0.1)], darker(colour), 0.2)
    pen.oval((0, 0.62), 0.5, 0.42, darker(colour, 0.88))
    pen.shape([(-0.62, -0.3), (-0.66, -1), (-0.1, -0.7)], darker(colour))
    pen.shape([(0.62, -0.3), (0.66, -1), (0.1, -0.7)], darker(colour))
    pen.oval((0, -0.22), 0.68, 0.56, colour)
    for side in (-1, 1):
        pen.oval((0.27 * side, -0.3), 0.15, 0.18, WHITE)
        pen.dot((0.27 * side, -0.27), 0.09)
    pen.shape([(-0.1, -0.06), (0.1, -0.06), (0, 0.06)], (240, 130, 140), None)
    pen.line([(-0.16, 0.16), (0, 0.08), (0.16, 0.16)], width=0.06)


def cup(pen: Pen, colour: Colour) -> None:
    for x in (-0.35, 0.1):
        pen.line([(x, -0.6), (x + 0.1, -0.74), (x, -0.88), (x + 0.1, -1)], WHITE, 0.1)
    pen.line(arc((0.56, 0.16), 0.36, 0.34, -90, 90), INK, 0.3)
    pen.line(arc((0.56, 0.16), 0.36, 0.34, -90, 90), colour, 0.14)
    pen.shape([(-0.72, -0.4), (0.6, -0.4), (0.48, 0.86), (-0.6, 0.86)], colour)
    pen.shape([(-0.66, 0.1), (0.54, 0.1), (0.51, 0.38), (-0.63, 0.38)], WHITE, None)
    pen.oval((-0.06, -0.4), 0.66, 0.17, (98, 60, 44))


def house(pen: Pen, colour: Colour) -> None:
    pen.shape([(0.36, -0.9), (0.62, -0.9), (0.62, -0.3), (0.36, -0.3)], darker(colour))
    pen.shape([(-0.72, -0.16), (0.72, -0.16), (0.72, 0.9), (-0.72, 0.9)], colour)
    pen.shape([(-1, -0.1), (0, -0.96), (1, -0.1)], (122, 70, 62))
    pen.shape([(-0.46, 0.9), (-0.46, 0.24), (-0.06, 0.24), (-0.06, 0.9)], BROWN)
    pen.shape([(0.18, 0.14), (0.54, 0.14), (0.54, 0.5), (0.18, 0.5)], GOLD)


def mushroom(pen: Pen, colour: Colour) -> None:
    pen.shape([(-0.26, -0.1), (0.26, -0.1), (0.36, 0.9), (-0.36, 0.9)], CREAM)
    pen.shape([*arc((0, 0.02), 0.96, 0.92, 180, 360), (0.6, 0.16), (-0.6, 0.16)], colour)
    for x, y, radius in ((-0.5, -0.22, 0.15), (0.02, -0.56, 0.18), (0.5, -0.24, 0.16), (0.02, -0.08, 0.11)):
        pen.dot((x, y), radius, WHITE)


def umbrella(pen: Pen, colour: Colour) -> None:
    pen.line([(0, -0.9), (0, 0.7), *arc((-0.17, 0.7), 0.17, 0.2, 0, 180)], INK, 0.13)
    scallops = [point for x in (0.64, 0, -0.64) for point in arc((x, 0), 0.32, 0.2, 0, -180)]
    pen.shape([*arc((0, 0), 0.96, 0.82, 180, 360), *scallops], colour)
    pen.shape([*arc((0, 0), 0.32, 0.82, 180, 360), *arc((0, 0), 0.32, 0.2, 0, -180)], darker(colour))
    pen.line([(0, -0.8), (0, -1)], INK, 0.1)


def boat(pen: Pen, colour: Colour) -> None:
    pen.line([(0, 0.4), (0, -1)], BROWN, 0.12)
    pen.shape([(0.08, -0.96), (0.08, 0.2), (0.86, 0.2)], colour)
    pen.shape([(-0.08, -0.7), (-0.08, 0.2), (-0.66, 0.2)], WHITE)
    pen.shape([(-0.96, 0.38), (0.98, 0.38), (0.66, 0.9), (-0.64, 0.9)], darker(colour, 0.85))
    pen.line([(-0.7, 0.6), (0.76, 0.6)], WHITE, 0.08)


KINDS: dict[str, Callable[[Pen, Colour], None]] = {
    "fish": fish,
    "bird": bird,
    "cat": cat,
    "cup": cup,
    "house": house,
    "mushroom": mushroom,
    "umbrella": umbrella,
    "boat": boat,
}

# Where kinds other than fish have their marks; `fish` draws its own.
BODIES: dict[str, tuple[tuple[float, float], float, float]] = {
    "bird": ((0.06, 0.32), 0.5, 0.36),
    "cat": ((0, 0.68), 0.42, 0.34),
    "cup": ((-0.06, 0.3), 0.54, 0.54),
    "house": ((0, 0.4), 0.66, 0.5),
    "mushroom": ((0, -0.34), 0.8, 0.46),
    "umbrella": ((0, -0.34), 0.8, 0.44),
    "boat": ((0, 0.64), 0.72, 0.24),
}
TOPS: dict[str, tuple[float, float]] = {
    "bird": (0.44, -0.78),
    "cat": (0, -0.72),
    "cup": (-0.06, -0.48),
    "house": (0, -0.82),
    "mushroom": (0, -0.84),
    "umbrella": (0, -0.8),
    "boat": (0, -0.84),
}
