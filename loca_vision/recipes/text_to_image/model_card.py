"""The model card of an adapter for a subject, a style or a concept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loca_vision.recipes.diffusion.card import Kind, arguments_of, card

_ALT = "base model, and adapter"
_CONCEPT = Kind("on", "images", "text-to-image", ("text-to-image",), _ALT)
_SUBJECT = Kind("on", "images", "text-to-image", ("text-to-image", "dreambooth"), _ALT)


def image_card(metrics: Mapping[str, Any], repository: str) -> str:
    """Return the `card` of a finished run of the text-to-image trainer."""
    config, prompt = metrics["config"], metrics["config"]["instance_prompt"]
    sampling = metrics["call_settings"] | {
        "height": config["resolution"],
        "width": config["resolution"],
        "num_inference_steps": config["validation_inference_steps"],
        "guidance_scale": config["validation_guidance_scale"],
    }
    return card(
        metrics,
        repository,
        _SUBJECT if prompt else _CONCEPT,
        pipeline=metrics["pipeline"],
        code=[f"picture = pipe(prompt={metrics['example_prompt']!r}, {arguments_of(sampling)}).images[0]"],
        more=[f"The subject was shown as `{prompt}`.", ""] if prompt else [],
    )
