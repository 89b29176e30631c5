"""The card of an adapter for InstructPix2Pix on the Hugging Face hub: what it is, on what it was trained, how to use it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loca_vision.methods.by_name import title_of
from loca_vision.recipes.reports.redaction import redact, tells_a_place


def edit_card(metrics: Mapping[str, Any], repository: str) -> str:
    """Base, data, numbers, picture and a piece of code that runs.

    Args:
        metrics: of a finished run, as train.py writes them.
        repository: "user/name".
    """
    config, title = metrics["config"], repository.rpartition("/")[2]
    base, local = _name(config["pretrained_model_name_or_path"])
    said = [
        "---",
        _metadata(config, title, None if local else base),
        "---",
        "",
        f"# {title}",
        "",
        f"{title_of(config['method'])} for the attention of `{base}`, trained to follow instructions about images on "
        f"{_data(config)} by loca-vision.",
        "",
        *_picture(metrics),
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
        f"pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained({_source(config, base)})",
        *_scheduler(config),
        f'pipe.load_loca_weights("{repository}")',
        f'photo = load_image("photo.png").convert("RGB").resize(({config["resolution"]}, {config["resolution"]}))',
        f"picture = pipe({metrics['example_prompt']!r}, image=photo, {_sampling(config)}).images[0]",
        "```",
        "",
        "The adapter has the licence of the base model at least, and the data's: neither is in here.",
    ]
    return "\n".join(said) + "\n"


def _name(place: str) -> tuple[str, bool]:
    """The base as it may be told to others, and whether it lay on this machine."""
    local = tells_a_place(place) or Path(place).exists()  # a folder may be gone since
    return (Path(redact(place)).name, True) if local else (place, False)


def _data(config: Mapping[str, Any]) -> str:
    place = config["train_data_dir"] or config["dataset_name"]
    name, local = _name(place)
    return f"a folder of pairs, {name}" if local else f"[{name}](https://huggingface.co/datasets/{name})"


def _source(config: Mapping[str, Any], base: str) -> str:
    """The arguments with which the base comes as it was trained on."""
    more = (f', {name}="{config[name]}"' for name in ("revision", "variant") if config[name])
    return f'"{base}"' + "".join(more)


def _scheduler(config: Mapping[str, Any]) -> list[str]:
    """Where the adapter was trained to predict another thing than the base's scheduler says, it has to be told."""
    kind = config["prediction_type"]
    told = f'pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="{kind}")'
    return [told] if kind else []


def _sampling(config: Mapping[str, Any]) -> str:
    """As in the picture."""
    settings = {
        "num_inference_steps": config["validation_inference_steps"],
        "guidance_scale": config["validation_guidance_scale"],
        "image_guidance_scale": config["validation_image_guidance_scale"],
    }
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def _beside(metrics: Mapping[str, Any]) -> str:
    whole = metrics["conv_in_parameters"]
    return f", and {whole:,} of the first convolution" if whole else ""


def _picture(metrics: Mapping[str, Any]) -> list[str]:
    if not metrics["validation_picture"]:
        return []
    return [f"![image, base model's edit, adapter's]({metrics['validation_picture']})", ""]


def _metadata(config: Mapping[str, Any], title: str, base: str | None) -> str:
    """By the conventions of the hub for adapters of diffusers."""
    from huggingface_hub import ModelCardData

    place = config["train_data_dir"] or config["dataset_name"]
    name, local = _name(place)
    data: str = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        license="other",
        license_name="of-the-base-model-and-the-data",
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=None if local else [name],
        tags=["stable-diffusion", "instruct-pix2pix", "loca-vision", config["method"]],
        model_name=title,
    ).to_yaml()
    return data
