"""The card of an adapter for InstructPix2Pix on the Hugging Face hub: what it is, on what it was trained, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loca_vision.methods.by_name import title_of
from loca_vision.recipes.diffusion.card import arguments_of, data_of, metadata, name_of, picture_in, scheduler_of, source_of

_TAGS = ("stable-diffusion", "instruct-pix2pix")


def edit_card(metrics: Mapping[str, Any], repository: str) -> str:
    """Base, data, numbers, picture and a piece of code that runs.

    Args:
        metrics: of a finished run, as train.py writes them.
        repository: "user/name".
    """
    config, title = metrics["config"], repository.rpartition("/")[2]
    base, local = name_of(config["pretrained_model_name_or_path"])
    place = config["train_data_dir"] or config["dataset_name"]
    said = [
        "---",
        metadata(config, place, title, None if local else base, task="image-to-image", tags=_TAGS),
        "---",
        "",
        f"# {title}",
        "",
        f"{title_of(config['method'])} for the attention of `{base}`, trained to follow instructions about images on "
        f"{data_of(place, 'pairs')} by loca-vision.",
        "",
        *picture_in(metrics, "image, base model's edit, adapter's"),
        "| | |",
        "|---|---|",
        f"| trained numbers | {metrics['trained_parameters']:,}{_beside(metrics)} |",
        f"| file | {metrics['adapter_bytes']:,} bytes |",
        f"| steps | {metrics['steps']:,} of {metrics['batch_size']} pairs of {config['resolution']} pixels a side |",
        f"| seed | {config['seed']} |",
        "",
        "```python",
        "import loca_vision.diffusers",
        "from diffusers import StableDiffusionInstructPix2PixPipeline",
        "from diffusers.utils import load_image",
        "",
        f"pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained({source_of(config, base)})",
        *scheduler_of(config),
        f'pipe.load_loca_weights("{repository}")',
        f'photo = load_image("photo.png").convert("RGB").resize(({config["resolution"]}, {config["resolution"]}))',
        f"picture = pipe({metrics['example_prompt']!r}, image=photo, {_sampling(config)}).images[0]",
        "```",
        "",
        "The adapter has the licence of the base model at least, and the data's: neither is in here.",
    ]
    return "\n".join(said) + "\n"


def _sampling(config: Mapping[str, Any]) -> str:
    """As in the picture."""
    settings = {
        "num_inference_steps": config["validation_inference_steps"],
        "guidance_scale": config["validation_guidance_scale"],
        "image_guidance_scale": config["validation_image_guidance_scale"],
    }
    return arguments_of(settings)


def _beside(metrics: Mapping[str, Any]) -> str:
    whole = metrics["conv_in_parameters"]
    return f", and {whole:,} of the first convolution" if whole else ""
