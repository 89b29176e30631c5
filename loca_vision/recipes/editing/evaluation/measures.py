"""Measure how close every edit is to its photograph, to its target and to the instruction."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from loca_vision.recipes.reports.image_quality import SMALLEST_LPIPS, Clip, Perceptual, finite, psnr, similarity, ssim

Measures = dict[str, float | None]
REFERENCES = ("photograph", "target")


@dataclass(frozen=True)
class Tools:
    """The measures with learned weights, if available, and the reasons for missing ones, by the names of the measures."""

    lpips: Perceptual | None = None
    clip: Clip | None = None
    unavailable: dict[str, str] = field(default_factory=dict)


def tools(*, lpips: bool, clip_model: str | None, resolution: int, device: torch.device | str = "cpu") -> Tools:
    """Return the available measures; missing ones are listed with the reason, and nothing is raised."""
    why: dict[str, str] = {}

    def tried(name: str, make: Callable[[], Any], reason: str | None) -> Any:
        """Return the tool, or None after recording the reason."""
        if reason is None:
            try:
                return make()
            except (OSError, ImportError) as error:
                reason = " ".join(str(error).split())
        why[name] = reason
        return None

    small = f"AlexNet needs {SMALLEST_LPIPS} pixels a side, and there are {resolution}" if resolution < SMALLEST_LPIPS else None
    perceptual = tried("lpips", lambda: Perceptual(device), small if lpips else "it was not asked for")
    clip = tried("clip", lambda: Clip(str(clip_model), device), None if clip_model else "no model was named")
    return Tools(perceptual, clip, why)


def measures_of(pictures: Mapping[str, Image.Image], prompt: str, using: Tools) -> dict[str, Measures]:
    """Return the measures of every picture by its name; the pictures include "photograph" and perhaps "target".

    `psnr_to_X`, `ssim_to_X`, `lpips_to_X` and `clip_to_X` compare with photograph and target. `clip_to_prompt` is the cosine to
    the instruction, which is not a caption: it tells which of two edits of one photograph is closer to the words. A measure is
    None if the weights are not available, and for the PSNR of equal pictures. No picture is compared with itself.
    """
    directions = {name: using.clip.image(picture) for name, picture in pictures.items()} if using.clip else {}
    text = using.clip.text(prompt) if using.clip else None
    measured: dict[str, Measures] = {}
    for name, picture in pictures.items():
        measures: Measures = {}
        for reference in (one for one in REFERENCES if one in pictures and one != name):
            other = pictures[reference]
            measures[f"psnr_to_{reference}"] = finite(psnr(picture, other))
            measures[f"ssim_to_{reference}"] = ssim(picture, other)
            measures[f"lpips_to_{reference}"] = using.lpips(picture, other) if using.lpips else None
            measures[f"clip_to_{reference}"] = similarity(directions[name], directions[reference]) if directions else None
        measures["clip_to_prompt"] = similarity(directions[name], text) if text is not None else None
        measured[name] = measures
    return measured


def summary(measured: Sequence[Mapping[str, Measures]]) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Return, by picture and measure, mean and standard deviation (of a sample, n - 1) over the photographs that have a number,
    and how many these are. The mean of none and the deviation of one are None."""
    means: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for name in measured[0]:
        means[name] = {}
        for measure in measured[0][name]:
            values = [value for one in measured if (value := one[name][measure]) is not None]
            means[name][measure] = {
                "mean": statistics.fmean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "photographs": len(values),
            }
    return means
