"""What an image file's header says: its format, its size, and how the camera was turned. No pixels are decoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from loca_vision.data.image_files import FORMATS

Opened = str | Path | BinaryIO
MOST_STRETCHED = 100  # largest ratio of an image's long side to its short one
ORIENTATION = 0x0112  # the EXIF field that says how the camera was turned
_LYING = (5, 6, 7, 8)  # the values for which width and height are swapped
_TIFF_SIDES = (256, 257)  # the fields for width and height
_PNG_TURNS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # the chunks that can say how a camera was turned


def open_header(content: Opened) -> Image.Image:
    """Open the image with its header read; no other program is ever started, as PIL would for EPS, whatever the ending."""
    return Image.open(content, formats=FORMATS)


@contextmanager
def named(name: object) -> Iterator[None]:
    """Turn PIL's errors in the block into one sentence that begins with the name of the image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as an image, or a ValueError was raised in the block.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: there is no such image") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: it cannot be read as an image") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:  # decoders can raise anything for hostile bytes
        raise ValueError(f"{name}: it cannot be read as an image ({error})") from error


def size_of(content: Opened, name: object) -> tuple[int, int]:
    """Return (width, height) in pixels of an image as shown upright, from its header.

    Args:
        content: its file, or the contents of its file.
        name: its name for error messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as an image, or as `check_shape`.
    """
    with named(name), open_header(content) as image:
        width, height = _stored_size(image)
        size = (height, width) if orientation_of(image) in _LYING else (width, height)
        check_shape(size)
        return size


def orientation_of(image: Image.Image) -> int | None:
    """Return how the camera was turned, 1 to 8 as in EXIF; None if the image does not say or its EXIF block is broken."""
    try:
        orientation = _exif(image).get(ORIENTATION)
    except Exception:  # of any kind, because arbitrary bytes are parsed
        return None
    return orientation if orientation in range(1, 9) else None


def check_shape(size: tuple[int, int]) -> None:
    """Refuse an image of extreme proportions.

    Raises:
        ValueError: with hundreds of pixels on its short side, an image of this shape would fill the memory.
    """
    if max(size) > MOST_STRETCHED * min(size):
        raise ValueError(f"{size[0]} x {size[1]} pixels: one side is over {MOST_STRETCHED} times the other")


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """Return (width, height) before it is turned; for a TIFF, some versions of PIL already report the turned size."""
    if isinstance(image, TiffImageFile):
        width, height = (int(image.tag_v2[side]) for side in _TIFF_SIDES)
        return width, height
    return image.size


def _exif(image: Image.Image) -> Image.Exif:
    """Return the EXIF block. PIL decodes a PNG's pixels to read what follows them, which is avoided if nothing does."""
    if not isinstance(image, PngImageFile) or _says_more_behind_pixels(image):
        return image.getexif()
    return Image.Image.getexif(image)


def _says_more_behind_pixels(image: PngImageFile) -> bool:
    file = image.fp
    if file is None:
        return False
    here, behind = file.tell(), False
    file.seek(8)  # skip the signature
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        behind = behind or head[4:] == b"IDAT"
        if behind and head[4:] in _PNG_TURNS:
            break
        file.seek(int.from_bytes(head[:4], "big") + 4, 1)  # skip the data and the four bytes of its checksum
    file.seek(here)
    return behind and head[4:] in _PNG_TURNS
