"""Edit photographs with an InstructPix2Pix pipeline: the same photograph, instruction and seed give the same edit."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from loca_vision.checks import check_count, check_seed, is_finite
from loca_vision.data.images import open_image
from loca_vision.data.pair_views import Drawn, View
from loca_vision.data.pairs import Pair
from loca_vision.recipes.diffusion.drawing import at_scale, untouched, without_adapters
from loca_vision.version import __version__

MOST_BYTES = 64 * 2**20  # of a photograph that is downloaded
_PATIENCE = (10, 30)  # seconds to wait for a connection, and for data on it


@dataclass(frozen=True)
class Sampling:
    """How an edit is drawn.

    Args:
        steps: steps of the scheduler, from 1 up.
        guidance_scale: how strongly the instruction counts, from 1 up (Brooks et al., 2023, s_T in equation 3).
        image_guidance_scale: how strongly the photograph counts, from 1 up (s_I there).

    Raises:
        ValueError: a value is out of range. Below 1 the pipeline would silently leave out all guidance.
    """

    steps: int = 20
    guidance_scale: float = 7.0
    image_guidance_scale: float = 1.5

    def __post_init__(self) -> None:
        check_count("steps", self.steps)
        for name in ("guidance_scale", "image_guidance_scale"):
            value = getattr(self, name)
            if not is_finite(value) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a finite number from 1 up")


def square(photo: Image.Image, size: int) -> Image.Image:
    """Return the photograph as the model sees it: upright, its short side resized to `size` pixels, cropped to its centre.

    Upright means turned as its EXIF orientation says. RGB, (size, size); the same pixels as the centre crop of `View(size)`.

    Raises:
        ValueError: the size is below 1.
    """
    upright = _upright(photo)
    return squares(Pair(upright, upright, ""), size)[0]


def squares(pair: Pair, size: int) -> tuple[Image.Image, Image.Image]:
    """Return both images of a pair as in training without random crops and flips: RGB, (size, size).

    Raises:
        ValueError: the size is below 1.
    """
    original, edited = View(size).pixels(pair, Drawn()).permute(0, 2, 3, 1).contiguous().numpy()
    return Image.fromarray(original), Image.fromarray(edited)


def edit(pipe: Any, photo: Image.Image, prompt: str, sampling: Sampling, *, seed: int, scale: float = 1.0) -> Image.Image:
    """Return one edit of a photograph: RGB, of the photograph's size.

    The noise is drawn on the CPU by the seed, so that every device makes the same edit up to rounding, and no global generator
    is used. Afterwards the pipeline is as it was: its models' training modes, its scheduler, its progress bar. If the pipeline
    has a safety checker, it checks the edit.

    Args:
        pipe: a `StableDiffusionInstructPix2PixPipeline` or its counterpart for XL, with or without adapters.
        photo: its sides must be multiples of the pipeline's `vae_scale_factor`; `square` makes one of a given size.
        prompt: the instruction.
        seed: from 0 to 2**63 - 1.
        scale: the strength of the pipeline's adapters in this call, times their weights. At 0 they are inactive, including the
            whole tensors from their files, such as a `conv_in`: the base model, bit for bit. At other scales the whole tensors
            apply in full.

    Raises:
        TypeError: the prompt is not a text.
        ValueError: the seed, scale or photograph is invalid; or the scale is 0 and an adapter is fused.
    """
    _check(pipe, photo, prompt, seed, scale)
    sized = "height" in signature(type(pipe).__call__).parameters  # by default XL's would resize the photograph
    told = {"height": photo.height, "width": photo.width} if sized else {}
    with ExitStack() as around:
        around.enter_context(untouched(pipe))
        around.enter_context(without_adapters(pipe) if scale == 0 else at_scale(pipe, scale))
        (edited,) = pipe(
            prompt,
            image=photo.convert("RGB"),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            image_guidance_scale=sampling.image_guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            **told,
        ).images
    rgb: Image.Image = edited.convert("RGB")
    return rgb


def read_photograph(place: str | Path) -> Image.Image:
    """Read the photograph at a path or an address that begins with http:// or https://: upright and RGB.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the address does not answer, answers with an error, or sends more than 64 MiB.
        ValueError: what is there cannot be read as an image.
    """
    if isinstance(place, str) and place.startswith(("http://", "https://")):
        return _upright(open_image(place, BytesIO(_fetched(place))))
    path = Path(place).expanduser()
    if path.exists() and not path.is_file():  # a FIFO would hang
        raise ValueError(f"{path}: expected the file of a photograph, got something else")
    return _upright(open_image(path))


def _upright(photo: Image.Image) -> Image.Image:
    """Return the photograph as the camera was held, in RGB."""
    turned: Image.Image = ImageOps.exif_transpose(photo)
    return turned.convert("RGB")


def _check(pipe: Any, photo: Image.Image, prompt: str, seed: int, scale: float) -> None:
    check_seed(seed)
    if not isinstance(prompt, str):
        raise TypeError(f"prompt must be one text, got a {type(prompt).__name__}")
    if not is_finite(scale):
        raise ValueError(f"scale={scale!r}: expected a finite number")
    factor = pipe.vae_scale_factor
    if any(side % factor for side in photo.size):
        raise ValueError(f"a photograph of {photo.width} x {photo.height} pixels: its sides are multiples of {factor}")


def _fetched(address: str) -> bytes:
    import requests

    agent = {"User-Agent": f"loca-vision/{__version__}"}  # some picture archives refuse clients without a name
    data = bytearray()
    try:
        with requests.get(address, stream=True, timeout=_PATIENCE, headers=agent) as answer:
            answer.raise_for_status()
            for piece in answer.iter_content(2**16):
                data += piece
                if len(data) > MOST_BYTES:
                    raise OSError(f"{address}: it has more than {MOST_BYTES} bytes")
    except requests.RequestException as error:
        raise OSError(f"{address}: it cannot be fetched ({' '.join(str(error).split())[:200]})") from error
    return bytes(data)
