"""Uploads by visitors: images that are checked before they are decoded, and drawings."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from loca_vision.data.images import open_image

MOST_BYTES = 20 * 2**20
MOST_PIXELS = 40_000_000


def read_upload(path: str | Path) -> Image.Image:
    """Read an uploaded image as RGB, upright.

    Raises:
        ValueError: it cannot be read as an image, or has more bytes or pixels than are allowed; the error does not reveal any
            path on this machine.
    """
    file = Path(path)
    size = file.stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"The image has {size / 2**20:.0f} MB; expected at most {MOST_BYTES // 2**20} MB.")
    try:
        with Image.open(file) as image:  # reads only the header
            width, height = image.size
        _check_pixels(width, height)
        return open_image(file)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError):
        raise ValueError(
            "The file cannot be read as an image; expected PNG, JPEG, WebP or another that Pillow reads."
        ) from None
    except ValueError as error:
        raise ValueError(str(error).removeprefix(f"{file}: ")) from None


def _check_pixels(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        most = MOST_PIXELS // 1_000_000
        raise ValueError(f"The image has {width} x {height} pixels; expected at most {most} million.")


def fitted(image: Image.Image, most: int) -> Image.Image:
    """Return the image, shrunk so that no side is longer than `most` pixels."""
    shrunk = image.copy()
    shrunk.thumbnail((most, most), Image.Resampling.LANCZOS)
    return shrunk
