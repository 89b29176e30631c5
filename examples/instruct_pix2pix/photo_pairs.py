"""The splits, instructions and crops of photographs, each determined by the seed and the photograph's content."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image, ImageOps

from loca_vision.data.images import open_image
from loca_vision.data.photographs import Photograph
from loca_vision.data.sampling import stream_seed

SPLITS = ("train", "validation", "test")
_CLOSEST = 0.4  # the side of the smallest crop, as a share of the photograph's short side

# Requests that users might make. A seed's choices depend on their order and number.
INSTRUCTIONS = (
    "Change the natural image to a cartoon-style image",
    "Turn this photograph into a cartoon",
    "Make it a cartoon",
    "Draw this picture as a cartoon",
    "Give the photo a cartoon look",
    "Convert the picture into a cartoon with flat colours",
    "Repaint this scene in cartoon style",
    "Make the photo look like a comic",
    "Show this as a frame of an animated film",
    "Redraw the photo with thick black outlines and flat colours",
    "Transform the photograph into a hand-drawn cartoon",
    "Apply a cartoon effect to the picture",
    "Let this look like a page of a comic book",
    "Cartoonize the photo",
    "Make this image look drawn",
    "Simplify the photo to a cartoon",
    "Replace the photograph by a cartoon of the same scene",
    "Turn the scene into an illustration with ink lines",
    "I want this photo as a cartoon",
    "Could you make a cartoon out of this picture?",
    "Render the image in the style of a cartoon",
    "Paint this photo like a children's book illustration",
    "Give everything in the picture bold outlines and few colours",
    "Create a cartoon version of the photograph",
    "Make this photo look like an old animated series",
    "Stylize the image as a cartoon",
    "Trace the photo with ink and fill it with plain colours",
    "Change the photo into cartoon art",
    "Turn what you see into a cartoon drawing",
    "Make a cartoon of it, with the same things in the same places",
)


def split_of(photograph: Photograph, seed: int, validation_share: float, test_share: float) -> str:
    """Return "train", "validation" or "test", by the seed and the content alone: adding other photographs changes nothing."""
    drawn = _draws(photograph, seed, "split").random()
    if drawn < test_share:
        return "test"
    return "validation" if drawn < test_share + validation_share else "train"


def instruction_for(photograph: Photograph, seed: int, crop: int) -> str:
    """Return one of the instructions, by seed, content and crop; crops of one photograph mostly get different ones."""
    first = _draws(photograph, seed, "instruction").randrange(len(INSTRUCTIONS))
    return INSTRUCTIONS[(first + 7 * crop) % len(INSTRUCTIONS)]


def crops_of(photograph: Photograph, seed: int, size: int, count: int) -> Iterator[Image.Image]:
    """Yield square crops of a photograph as RGB images of `size` pixels per side; none if one of its sides is shorter.

    The first crop is the largest possible, from the centre; the others are drawn by seed and content.

    Raises:
        ValueError: the file cannot be read as an image.
    """
    image = ImageOps.exif_transpose(open_image(photograph.file))  # undo the rotation of the camera
    short, draws = min(image.size), _draws(photograph, seed, "crops")
    if short < size:
        return
    yield _part(image, short, (0.5, 0.5), size)
    for _ in range(count - 1):
        side = round(max(size, short * draws.uniform(_CLOSEST, 1.0)))
        yield _part(image, side, (draws.random(), draws.random()), size)


def _part(image: Image.Image, side: int, at: Sequence[float], size: int) -> Image.Image:
    """Cut a square with the given side, at shares of the way from left to right and from top to bottom."""
    left, top = (int(share * (length - side)) for share, length in zip(at, image.size, strict=True))
    box: Any = (left, top, left + side, top + side)
    return image.crop(box).resize((size, size), Image.Resampling.LANCZOS)


def _draws(photograph: Photograph, seed: int, what: str) -> random.Random:
    """Return the random number generator of a photograph for one purpose."""
    return random.Random(stream_seed(seed, int(photograph.content, 16), int.from_bytes(what.encode(), "big")))
