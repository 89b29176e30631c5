"""The card of an InstructPix2Pix adapter on the Hugging Face hub: what it is, what it was trained on, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loca_vision.recipes.diffusion.card import Kind, arguments_of, card

_KIND = Kind(
    "to follow instructions about images on",
    "pairs",
    "image-to-image",
    ("stable-diffusion", "instruct-pix2pix"),
    "image, base model's edit, adapter's",
)
_PIPELINE = "StableDiffusionInstructPix2PixPipeline"  # for runs that did not record theirs


def edit_card(metrics: Mapping[str, Any], repository: str) -> str:
    """Return the `card` of a finished run of the trainer of edits."""
    config, whole, pipeline = metrics["config"], metrics["conv_in_parameters"], metrics.get("pipeline", _PIPELINE)
    side = config["resolution"]
    sampling = {
        "num_inference_steps": config["validation_inference_steps"],
        "guidance_scale": config["validation_guidance_scale"],
        "image_guidance_scale": config["validation_image_guidance_scale"],
    }
    size = {"height": side, "width": side} if "XL" in pipeline else {}  # by default XL's would resize the photograph
    return card(
        metrics,
        repository,
        _KIND,
        pipeline=pipeline,
        imports=["from diffusers.utils import load_image"],
        code=[
            f'photo = load_image("photo.png").convert("RGB").resize(({side}, {side}))',
            f"picture = pipe({metrics['example_prompt']!r}, image=photo, {arguments_of(sampling | size)}).images[0]",
        ],
        besides=f", and {whole:,} of the first convolution" if whole else "",
    )
