"""The pipeline that is trained to edit, or edited with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline

from loca_vision.recipes.diffusion.loading import Source


def pipeline_of(source: str, *, revision: str | None = None, variant: str | None = None, cache_dir: Path | None = None) -> Any:
    """A pipeline of InstructPix2Pix, in float32, on the CPU, from safetensors files alone.

    Without a safety checker, which would put black pictures among those that nobody shows to anybody.

    Args:
        source: a folder, or a name on the hub; also of a plain Stable Diffusion, 1, 2 or XL.
        revision: of the repository on the hub.
        variant: of the files, such as fp16.
        cache_dir: of what comes from the hub.

    Raises:
        OSError: it cannot be had, or is no such pipeline in safetensors files.
    """
    what = "a pipeline of InstructPix2Pix"
    found = Source(source, revision=revision, variant=variant, cache_dir=cache_dir, what=what)
    if found.class_name().startswith("StableDiffusionXL"):
        return found.load(StableDiffusionXLInstructPix2PixPipeline, add_watermarker=False)
    return found.load(StableDiffusionInstructPix2PixPipeline)
