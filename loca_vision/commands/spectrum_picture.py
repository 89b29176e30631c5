"""The cosine spectrum of every update in a file, as one picture."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from loca_vision.commands.inspect_file import Layer
from loca_vision.functional.dct import dct2
from loca_vision.recipes.reports.plots import MOST_PANELS, save

_PIXELS, _DECADES = 96, 4.0
_LETTERS = 30  # in a title as wide as its panel


def draw_spectra(path: Path, title: str, layers: Iterator[Layer]) -> None:
    """Draw |DCT| of each update on a logarithmic scale, low frequencies at the top left; each pixel shows its largest value.

    Raises:
        ValueError: no update has a matrix of its own.
        OSError: the picture could not be written.
    """
    drawn = list(islice(((layer.name, _shrunk(layer.delta)) for layer in layers if layer.delta is not None), MOST_PANELS))
    if not drawn:
        raise ValueError("no update in the file has a spectrum without the weight it is added to")
    largest = max(float(image.max()) for _, image in drawn)
    top = math.log10(largest) if largest else 0.0
    across = min(len(drawn), 8)
    down = math.ceil(len(drawn) / across)
    figure = Figure(figsize=(2.1 * across + 1, 2.2 * down + 1), layout="constrained")
    panels = list(figure.subplots(down, across, squeeze=False).flat)
    for panel, (name, image) in zip(panels, drawn, strict=False):
        decades = image.clamp(min=10 ** (top - _DECADES)).log10()
        shown = panel.imshow(decades.tolist(), vmin=top - _DECADES, vmax=top, cmap="YlGnBu")
        panel.set_title(_in_lines(name), fontsize=6)
        panel.set(xticks=[], yticks=[])
    for empty in panels[len(drawn) :]:
        empty.set_axis_off()
    figure.suptitle(title)
    figure.colorbar(shown, ax=figure.axes, label="log10 |coefficient|", shrink=0.6, pad=0.01)
    save(figure, path)


def _in_lines(name: str) -> str:
    """Break a name after dots, so that titles of neighbouring panels do not overlap."""
    lines = [""]
    for part in re.findall(r"[^.]+\.?", name):
        if lines[-1] and len(lines[-1]) + len(part) > _LETTERS:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _shrunk(delta: Tensor) -> Tensor:
    """Return |DCT| with a limited number of pixels a side, by maxima so that a lone coefficient does not vanish."""
    magnitudes = dct2(delta.float()).abs()
    rows, cols = (min(size, _PIXELS) for size in magnitudes.shape)
    pooled: Tensor = F.adaptive_max_pool2d(magnitudes[None], (rows, cols))[0]
    return pooled if torch.isfinite(pooled).all() else torch.zeros_like(pooled)
