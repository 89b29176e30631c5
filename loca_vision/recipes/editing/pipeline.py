"""Load the pipeline that is trained to edit, or that edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline

from loca_vision.recipes.diffusion.families.by_pipeline import EDITING
from loca_vision.recipes.diffusion.loading import Source
from loca_vision.recipes.diffusion.quantised import Quantization


def pipeline_of(
    source: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    cache_dir: Path | None = None,
    quantization: Quantization | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Load an InstructPix2Pix pipeline on the CPU, only from safetensors files.

    It has no safety checker, which would replace pictures by black ones although nobody publishes them.

    Args:
        source: a folder, or a name on the hub; also of a plain Stable Diffusion, 1, 2 or XL.
        revision: revision of the repository on the hub.
        variant: variant of the files, such as fp16.
        cache_dir: cache folder for files from the hub.
        quantization: quantisation of the UNet.
        dtype: dtype of the weights.

    Raises:
        OSError: it is not available, or is not such a pipeline in safetensors files.
    """
    what = "a pipeline of InstructPix2Pix"
    found = Source(source, revision=revision, variant=variant, cache_dir=cache_dir, what=what)
    xl = found.class_name().startswith("StableDiffusionXL")
    cls = StableDiffusionXLInstructPix2PixPipeline if xl else StableDiffusionInstructPix2PixPipeline
    family = EDITING[cls.__name__]
    return found.load(cls, family, dtype, quantization, **({"add_watermarker": False} if xl else {}))
