"""The pipeline that is trained, or edited with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import StableDiffusionInstructPix2PixPipeline

from loca_vision.data.pair_sources import is_missing


def pipeline_of(source: str, *, revision: str | None = None, variant: str | None = None, cache_dir: Path | None = None) -> Any:
    """A pipeline of InstructPix2Pix, in float32, on the CPU, from safetensors files alone.

    Without a safety checker, which would put black pictures among those that nobody shows to anybody.

    Args:
        source: a folder, or a name on the hub; also of a plain Stable Diffusion.
        revision: of the repository on the hub.
        variant: of the files, such as fp16.
        cache_dir: of what comes from the hub.

    Raises:
        OSError: it cannot be had, or is no such pipeline in safetensors files.
    """
    place = str(Path(source).expanduser()) if source.startswith("~") else source
    if is_missing(place):
        raise OSError(f"{source}: it cannot be loaded as a pipeline: there is no such folder, and the hub names them user/name")
    wanted = {"revision": revision, "variant": variant, "cache_dir": cache_dir}
    try:
        return StableDiffusionInstructPix2PixPipeline.from_pretrained(
            place,
            **{name: value for name, value in wanted.items() if value is not None},
            safety_checker=None,
            requires_safety_checker=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:  # diffusers tells a fault in several ways
        reason = " ".join(str(error).split())[:300]
        raise OSError(f"{source}: it cannot be loaded as a pipeline of InstructPix2Pix ({reason})") from error
