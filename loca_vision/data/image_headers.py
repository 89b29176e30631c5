"""What the header of an image file says: which format it is, how large, how the camera was turned. No pixels are decoded."""

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
MOST_STRETCHED = 100  # times that an image's long side may have its short one
ORIENTATION = 0x0112  # the EXIF field that says how the camera was turned
_LYING = (5, 6, 7, 8)  # its values at which width and height change places
_TIFF_SIDES = (256, 257)  # the fields for width and height
_PNG_TURNS = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")  # the chunks that can say how a camera was turned


def open_header(content: Opened) -> Image.Image:
    """The image with its header read; another program, as for EPS, is never started, whatever the file's ending."""
    return Image.open(content, formats=FORMATS)


@contextmanager
def named(name: object) -> Iterator[None]:
    """Errors of PIL in the block as one sentence that begins with the name of the image.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as an image, or as was raised.
    """
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: there is no such image") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: it cannot be read as an image") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    except Exception as error:  # whatever a decoder raises at hostile bytes
        raise ValueError(f"{name}: it cannot be read as an image ({error})") from error


def size_of(content: Opened, name: object) -> tuple[int, int]:
    """(width, height) in pixels of an image as it is shown upright, from its header.

    Args:
        content: its file, or what would be in it.
        name: for messages.

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
    """How the camera was turned, 1 to 8 as in EXIF; None where the image does not say it, or its EXIF block is broken."""
    try:
        orientation = _exif(image).get(ORIENTATION)
    except Exception:  # of many kinds: the block is parsed from whatever bytes are there
        return None
    return orientation if orientation in range(1, 9) else None


def check_shape(size: tuple[int, int]) -> None:
    """
    Raises:
        ValueError: brought to hundreds of pixels on the short side, an image of that size would fill the memory.
    """
    if max(size) > MOST_STRETCHED * min(size):
        raise ValueError(f"{size[0]} x {size[1]} pixels: one side is over {MOST_STRETCHED} times the other")


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) before it is turned; of a TIFF some versions of PIL already tell how it will be after that."""
    if isinstance(image, TiffImageFile):
        width, height = (int(image.tag_v2[side]) for side in _TIFF_SIDES)
        return width, height
    return image.size


def _exif(image: Image.Image) -> Image.Exif:
    """The EXIF block. Of a PNG, PIL would decode the pixels to look behind them; that is needed only if something is there."""
    if not isinstance(image, PngImageFile) or _says_more_behind_pixels(image):
        return image.getexif()
    return Image.Image.getexif(image)


def _says_more_behind_pixels(image: PngImageFile) -> bool:
    file = image.fp
    if file is None:
        return False
    here, behind = file.tell(), False
    file.seek(8)  # after the signature
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        behind = behind or head[4:] == b"IDAT"
        if behind and head[4:] in _PNG_TURNS:
            break
        file.seek(int.from_bytes(head[:4], "big") + 4, 1)  # the checksum has four bytes
    file.seek(here)
    return behind and head[4:] in _PNG_TURNS
