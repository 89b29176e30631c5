"""The model card of an adapter that draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loca_vision.methods.by_name import title_of
from loca_vision.recipes.diffusion.card import arguments_of, data_of, metadata, name_of, picture_in, scheduler_of, source_of


def image_card(metrics: Mapping[str, Any], repository: str) -> str:
    """Base, data, numbers, picture and a piece of code that runs.

    Args:
        metrics: of a finished run, as the trainer writes them.
        repository: "user/name".
    """
    config, title, kind = metrics["config"], repository.rpartition("/")[2], metrics["pipeline"]
    base, local = name_of(config["pretrained_model_name_or_path"])
    place = config["instance_data_dir"] or config["train_data_dir"] or config["dataset_name"]
    tags = ("text-to-image", *(["dreambooth"] if config["instance_prompt"] else []))
    said = [
        "---",
        metadata(config, place, title, None if local else base, task="text-to-image", tags=tags),
        "---",
        "",
        f"# {title}",
        "",
        f"{title_of(config['method'])} for the attention of `{base}`, trained on {data_of(place, 'images')} by loca-vision.",
        "",
        *_prompt(config),
        *picture_in(metrics, "base model, and adapter"),
        *_table(metrics),
        "",
        "```python",
        "import loca_vision.diffusers",
        f"from diffusers import {kind}",
        "",
        f"pipe = {kind}.from_pretrained({source_of(config, base)})",
        *scheduler_of(config),
        f'pipe.load_loca_weights("{repository}")',
        f"picture = pipe(prompt={metrics['example_prompt']!r}, {_sampling(metrics)}).images[0]",
        "```",
        "",
        "The adapter has the licence of the base model at least, and the data's: neither is in here.",
    ]
    return "\n".join(said) + "\n"


def _prompt(config: Mapping[str, Any]) -> list[str]:
    """What the subject is called."""
    prompt = config["instance_prompt"]
    return [f"The subject was shown as `{prompt}`.", ""] if prompt else []


def _table(metrics: Mapping[str, Any]) -> list[str]:
    config = metrics["config"]
    return [
        "| | |",
        "|---|---|",
        f"| trained numbers | {metrics['trained_parameters']:,} |",
        f"| file | {metrics['adapter_bytes']:,} bytes |",
        f"| steps | {metrics['steps']:,} of {metrics['batch_size']} images of {config['resolution']} pixels a side |",
        f"| seed | {config['seed']} |",
    ]


def _sampling(metrics: Mapping[str, Any]) -> str:
    """As in the picture."""
    config = metrics["config"]
    return arguments_of(
        metrics["call_settings"]
        | {
            "height": config["resolution"],
            "width": config["resolution"],
            "num_inference_steps": config["validation_inference_steps"],
            "guidance_scale": config["validation_guidance_scale"],
        }
    )
