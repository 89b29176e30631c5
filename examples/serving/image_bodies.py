"""Read images from the bodies of requests; their headers are checked before any pixel is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from loca_vision.data.images import as_rgb, upright
from loca_vision.messages import one_line
from refusals import Refusal

FORMATS = ("JPEG", "PNG")
LONGEST = 16  # times the short side, since the transform scales up both sides together


@dataclass(frozen=True)
class ImageLimits:
    """The limits for images in requests.

    Args:
        most_bytes: the maximum size of an image file in bytes.
        most_pixels: the maximum width times height.
    """

    most_bytes: int
    most_pixels: int


def too_many_bytes(limits: ImageLimits) -> Refusal:
    return Refusal(413, f"expected an image of at most {limits.most_bytes:,} bytes, got more")


def image_of(body: bytes, limits: ImageLimits) -> Image.Image:
    """Return the image as RGB, upright.

    Raises:
        Refusal: the body is not an image, has another format, is too large, or is broken.
    """
    if not body:
        raise Refusal(400, "expected an image as the body of the request, got nothing")
    if len(body) > limits.most_bytes:
        raise too_many_bytes(limits)
    try:
        with Image.open(BytesIO(body), formats=FORMATS) as image:
            _check_size(image, limits)
            return as_rgb(upright(image))
    except Refusal:
        raise
    except UnidentifiedImageError:
        raise Refusal(415, f"expected a {' or '.join(FORMATS)} image, got something else") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refusal(413, f"expected at most {limits.most_pixels:,} pixels, got far more") from None
    except Exception as error:  # decoders raise many kinds of errors for broken bytes
        raise Refusal(422, f"the image cannot be read ({one_line(error, 200)})") from None


def _check_size(image: Image.Image, limits: ImageLimits) -> None:
    width, height = image.size
    if width * height > limits.most_pixels:
        raise Refusal(413, f"expected at most {limits.most_pixels:,} pixels, got {width} x {height}")
    if max(width, height) > LONGEST * min(width, height):
        raise Refusal(422, f"expected a long side of at most {LONGEST} short ones, got {width} x {height}")
