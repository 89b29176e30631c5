"""The canvas, as dark as the images a model was trained on, and drawings on it, made as large and as coarse as those images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageChops

SIDE = 280  # pixels
_DARK, _LIGHT = "#000000", "#ffffff"


def colours(examples: Sequence[Image.Image]) -> tuple[str, str]:
    """Return the colours of canvas and brush: dark and light if most examples have dark edges, otherwise light and dark."""
    edges = [_edge_brightness(image) for image in examples]
    return (_DARK, _LIGHT) if edges and float(np.median(edges)) < 128 else (_LIGHT, _DARK)


def blank(canvas: str) -> Image.Image:
    """Return the empty canvas."""
    return Image.new("RGB", (SIDE, SIDE), canvas)


def is_blank(image: Image.Image, canvas: str) -> bool:
    """Return whether nothing is drawn."""
    return _drawn(image, canvas) is None


def as_example(image: Image.Image, canvas: str, size: tuple[int, int] | None) -> Image.Image:
    """Return a drawing as a scan would look: cut out, centred and, if the examples are small, with as few pixels as they have.

    Args:
        image: RGB, not blank.
        size: the size of the examples, (width, height); None keeps the drawing's number of pixels.
    """
    box = _drawn(image, canvas)
    assert box is not None
    drawn = image.crop(box)
    side = max(drawn.size)
    square = Image.new("RGB", (side, side), canvas)
    square.paste(drawn, ((side - drawn.width) // 2, (side - drawn.height) // 2))
    if size is None or min(size) >= side:
        return square
    return square.resize(size, Image.Resampling.BOX)


def _drawn(image: Image.Image, canvas: str) -> tuple[int, int, int, int] | None:
    difference = ImageChops.difference(image, Image.new("RGB", image.size, canvas)).convert("L")
    return difference.point(lambda value: 255 * (value > 40)).getbbox()  # type: ignore[no-any-return, unused-ignore]


def _edge_brightness(image: Image.Image) -> float:
    grey = np.asarray(image.convert("L"), np.float64)
    return float(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]).mean())
