"""A photograph as a cartoon, by a fixed OpenCV filter: flat colours inside, ink on the outlines."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

VERSION = 1  # of the filter; another picture for the same photograph is another version
COLOURS = 14
SMALLEST = 16  # pixels a side
_WORKING = 256  # pixels of the short side, at least: where lines have a width that can be smoothed
_SEED = 7
_HUES = np.array([1, 2, 2], np.float32)  # L, a, b

Pixels = np.ndarray[Any, Any]


def cartoon(photograph: Image.Image) -> Image.Image:
    """The photograph in at most `COLOURS` colours of its own with dark outlines: RGB of the same size.

    A function of the pixels alone: the same bits at every call, in every process, with one version of OpenCV. Small
    photographs are enlarged for the filter and the result is shrunk, so that lines are as wide for the eye at every size.

    Raises:
        ValueError: a side of fewer than 16 pixels.
        ModuleNotFoundError: OpenCV is not installed.
    """
    cv2 = opencv()
    if min(photograph.size) < SMALLEST:
        raise ValueError(
            f"a photograph must have at least {SMALLEST} pixels a side, got {photograph.width} x {photograph.height}"
        )
    pixels = np.asarray(photograph.convert("RGB"))
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # sums in one order
    try:
        large = _enlarged(cv2, pixels)
        drawn = _inked(_flat(cv2, large), _ink(cv2, large))
        return Image.fromarray(cv2.resize(drawn, photograph.size, interpolation=cv2.INTER_AREA))
    finally:
        cv2.setNumThreads(threads)


def opencv() -> ModuleType:
    """
    Raises:
        ModuleNotFoundError: it is not installed; the sentence says how it can be.
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
    enlarged: Pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_LANCZOS4)
    return enlarged


def _flat(cv2: Any, pixels: Pixels) -> Pixels:
    """Without texture, every pixel in the nearest of a few colours: means in Lab, where distances are those of the eye.

    Hues count double there, so that a small red roof is not lost in a large brown wood.
    """
    smooth = cv2.edgePreservingFilter(pixels, flags=cv2.RECURS_FILTER, sigma_s=20, sigma_r=0.3)
    lab = cv2.cvtColor(smooth, cv2.COLOR_RGB2LAB).astype(np.float32) * _HUES
    sample = cv2.resize(lab, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA).reshape(-1, 3)
    cv2.setRNGSeed(_SEED)
    until = (cv2.TERM_CRITERIA_EPS + cv2.TERM_CRITERIA_MAX_ITER, 20, 0.5)
    _, _, centres = cv2.kmeans(sample, COLOURS, None, until, 2, cv2.KMEANS_PP_CENTERS)
    distances = [((lab - centre) ** 2).sum(axis=2) for centre in centres]
    colours = (centres / _HUES).round().clip(0, 255).astype(np.uint8)[np.argmin(distances, axis=0)]
    return _vivid(cv2, cv2.medianBlur(cv2.cvtColor(colours, cv2.COLOR_LAB2RGB), 5))


def _vivid(cv2: Any, pixels: Pixels) -> Pixels:
    """Colours stronger and lighter, as paint is."""
    colours = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV).astype(np.int32)
    colours[..., 1] = np.minimum(255, colours[..., 1] * 13 // 10)
    colours[..., 2] = np.minimum(255, colours[..., 2] * 11 // 10 + 8)
    vivid: Pixels = cv2.cvtColor(colours.astype(np.uint8), cv2.COLOR_HSV2RGB)
    return vivid


def _ink(cv2: Any, pixels: Pixels) -> Pixels:
    """How much ink: (h, w) float32, 1 on lines, which are where it is darker than around; specks are left out."""
    smooth = cv2.edgePreservingFilter(pixels, flags=cv2.RECURS_FILTER, sigma_s=8, sigma_r=0.25)
    grey = cv2.medianBlur(cv2.cvtColor(smooth, cv2.COLOR_RGB2GRAY), 3)
    short = min(grey.shape)
    lines = cv2.adaptiveThreshold(grey, 255, cv2.ADAPTIVE_THRESH_MEAN_C, cv2.THRESH_BINARY_INV, (short // 24) | 1, 9)
    _, labels, facts, _ = cv2.connectedComponentsWithStats(lines, connectivity=8)
    drawn = np.maximum(facts[:, cv2.CC_STAT_WIDTH], facts[:, cv2.CC_STAT_HEIGHT]) >= short // 24
    drawn[0] = False  # the paper
    ink: Pixels = cv2.GaussianBlur(drawn[labels].astype(np.float32), (3, 3), 0)
    return ink


def _inked(colours: Pixels, ink: Pixels) -> Pixels:
    """Lines in nearly black over the colours."""
    inked: Pixels = (colours * (1 - 0.85 * ink[..., None])).round().astype(np.uint8)
    return inked
