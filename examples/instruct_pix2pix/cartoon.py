"""Turn a photograph into a cartoon with a fixed OpenCV filter: flat colours inside, ink on the outlines."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

VERSION = 2  # of the filter; increase it when the same photograph gives a different picture
SMALLEST = 16  # pixels per side
_WORKING = 256  # pixels of the short side, at least: enough to smooth shapes and draw lines of some width
_LIGHTNESS = np.array([16, 42, 66, 90], np.float32)  # of the paints, in Lab: 0 to 100
_HUE = 26.0  # the step between paints in a and b; grey is one of the paints
_STRONGER = 1.25  # the factor on a and b before they are rounded to a paint
_REALLY_DIFFERENT = 28.0  # one step of lightness alone is below this, a step of both lightness and hue is above

Pixels = np.ndarray[Any, Any]


def cartoon(photograph: Image.Image) -> Image.Image:
    """Return the photograph in flat, vivid paints with dark outlines between very different ones, as RGB of the same size.

    The result depends on the pixels alone: with one version of OpenCV, every call in every process returns the same bits. Small
    photographs are enlarged for the filter and the result is shrunk, so that lines look equally wide at every size.

    Raises:
        ValueError: a side has fewer than 16 pixels.
        ModuleNotFoundError: OpenCV is not installed.
    """
    cv2 = opencv()
    if min(photograph.size) < SMALLEST:
        raise ValueError(
            f"a photograph must have at least {SMALLEST} pixels a side, got {photograph.width} x {photograph.height}"
        )
    pixels = np.asarray(photograph.convert("RGB"))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # so that sums are always computed in the same order
    try:
        large = _enlarged(cv2, pixels)
        paints = _flat(cv2, large)
        drawn = _inked(paints, _ink(cv2, paints))
        return Image.fromarray(cv2.resize(drawn, photograph.size, interpolation=cv2.INTER_AREA))
    finally:
        cv2.setNumThreads(threads)


def opencv() -> ModuleType:
    """Import OpenCV.

    Raises:
        ModuleNotFoundError: OpenCV is not installed; the message says how to install it.
    """
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "OpenCV is missing: python -m pip install 'loca-vision[pairs]'", name="opencv-python-headless"
        ) from error
    module: ModuleType = cv2
    return module


def _enlarged(cv2: Any, pixels: Pixels) -> Pixels:
    factor = max(1.0, _WORKING / min(pixels.shape[:2]))
    size = [round(factor * side) for side in pixels.shape[1::-1]]
    enlarged: Pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)
    return enlarged


def _flat(cv2: Any, pixels: Pixels) -> Pixels:
    """Remove texture and map every pixel to the nearest paint. The paints are the same for all photographs.

    They are a few steps of lightness and hue in Lab, where distances match perception. If the paints depended on the whole
    photograph, they would be harder to predict for a model trained on a few photographs.
    """
    scale = min(pixels.shape[:2]) / _WORKING
    smooth = cv2.edgePreservingFilter(pixels, flags=cv2.RECURS_FILTER, sigma_s=20 * scale, sigma_r=0.3)
    smooth = cv2.pyrMeanShiftFiltering(smooth, 10 * scale, 22, maxLevel=1)
    lab = cv2.cvtColor(smooth.astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    lab[..., 0] = _LIGHTNESS[np.abs(lab[..., :1] - _LIGHTNESS).argmin(-1)]
    lab[..., 1:] = (_STRONGER * lab[..., 1:] / _HUE).round() * _HUE
    paints = (255 * cv2.cvtColor(lab, cv2.COLOR_LAB2RGB).clip(0, 1)).round().astype(np.uint8)
    flat: Pixels = cv2.medianBlur(paints, _odd(9 * scale))
    return flat


def _ink(cv2: Any, paints: Pixels) -> Pixels:
    """Return the mask (h, w) of bool that is true where ink goes: between very different paints, without specks."""
    scale = min(paints.shape[:2]) / _WORKING
    lab = cv2.cvtColor(paints.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) * np.array([1, 0.6, 0.6], np.float32)
    pen = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, [_odd(7 * scale)] * 2)
    steps = [cv2.dilate(part, pen) - cv2.erode(part, pen) for part in cv2.split(lab)]
    lines = (np.sqrt(sum(step**2 for step in steps)) > _REALLY_DIFFERENT).astype(np.uint8)
    _, labels, facts, _ = cv2.connectedComponentsWithStats(lines, connectivity=8)
    drawn = np.maximum(facts[:, cv2.CC_STAT_WIDTH], facts[:, cv2.CC_STAT_HEIGHT]) >= 32 * scale
    drawn[0] = False  # label 0 is the background, which gets no ink
    ink: Pixels = drawn[labels]
    return ink


def _odd(width: float) -> int:
    """Round a width in pixels to an odd number, so that it has a middle pixel."""
    return round((width - 1) / 2) * 2 + 1


def _inked(colours: Pixels, ink: Pixels) -> Pixels:
    """Draw nearly black lines over the colours."""
    inked: Pixels = (colours * (1 - 0.9 * ink[..., None])).round().astype(np.uint8)
    return inked
