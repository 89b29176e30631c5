"""What model cards of diffusion adapters share: the base, the data, the pieces of code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loca_vision.recipes.reports.redaction import redact, tells_a_place


def name_of(place: str) -> tuple[str, bool]:
    """A base or data set as it may be told to others, and whether it lay on this machine."""
    local = tells_a_place(place) or Path(place).exists()  # a folder may be gone since
    return (Path(redact(place)).name, True) if local else (place, False)


def data_of(place: str, what: str) -> str:
    """The data set as a link to the hub, or as a folder of `what`."""
    name, local = name_of(place)
    return f"a folder of {what}, {name}" if local else f"[{name}](https://huggingface.co/datasets/{name})"


def source_of(config: Mapping[str, Any], base: str) -> str:
    """The arguments with which the base comes as it was trained on."""
    more = (f', {name}="{config[name]}"' for name in ("revision", "variant") if config[name])
    return f'"{base}"' + "".join(more)


def scheduler_of(config: Mapping[str, Any]) -> list[str]:
    """Where the adapter was trained to predict another thing than the base's scheduler says, it has to be told."""
    kind = config["prediction_type"]
    told = f'pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="{kind}")'
    return [told] if kind else []


def arguments_of(settings: Mapping[str, Any]) -> str:
    """Settings as arguments of a call; what is None is left to the pipeline."""
    return ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def picture_in(metrics: Mapping[str, Any], alt: str) -> list[str]:
    """The validation picture, where there is one."""
    return [f"![{alt}]({metrics['validation_picture']})", ""] if metrics["validation_picture"] else []


def metadata(config: Mapping[str, Any], place: str, title: str, base: str | None, *, task: str, tags: Sequence[str]) -> str:
    """By the conventions of the hub for adapters of diffusers.

    Args:
        place: where the data set is.
        base: its name on the hub; None where it lay on this machine.
        task: the hub's name of it.
    """
    from huggingface_hub import ModelCardData

    name, local = name_of(place)
    data: str = ModelCardData(
        library_name="diffusers",
        pipeline_tag=task,
        license="other",
        license_name="of-the-base-model-and-the-data",
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=None if local else [name],
        tags=[*tags, "loca-vision", config["method"]],
        model_name=title,
    ).to_yaml()
    return data
