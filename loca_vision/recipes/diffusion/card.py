"""What the model cards of diffusion adapters share: the base, the data, the pieces of code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loca_vision.methods.by_name import title_of
from loca_vision.recipes.reports.redaction import redact, tells_a_place


@dataclass(frozen=True)
class Kind:
    """The parts of a card that depend on the trainer.

    Args:
        about: what the adapter was trained to do, up to the data: "to follow instructions about images on".
        noun: what samples are called, in the plural.
        task: the hub's name of the task.
        tags: tags for the hub.
        alt: a description of the picture.
    """

    about: str
    noun: str
    task: str
    tags: tuple[str, ...]
    alt: str


def card(
    metrics: Mapping[str, Any],
    repository: str,
    kind: Kind,
    *,
    pipeline: str,
    code: Sequence[str],
    imports: Sequence[str] = (),
    more: Sequence[str] = (),
    besides: str = "",
) -> str:
    """Return a card with base, data, numbers, picture and a piece of code that runs.

    Args:
        metrics: the metrics of a finished run, as the trainer writes them.
        repository: "user/name".
        pipeline: the name of its class.
        code: the lines that draw, once the adapter is loaded.
        imports: import lines that the code needs.
        more: paragraphs above the picture.
        besides: what was trained besides the adapter.
    """
    config, title = metrics["config"], repository.rpartition("/")[2]
    base, local = name_of(config["pretrained_model_name_or_path"])
    place = config.get("instance_data_dir") or config["train_data_dir"] or config["dataset_name"]
    data = _data(place, kind)
    said = [
        "---",
        _metadata(config, place, title, None if local else base, kind),
        "---",
        "",
        f"# {title}",
        "",
        f"{title_of(config['method'])} for the attention of `{base}`, trained {kind.about} {data} by loca-vision.",
        "",
        *more,
        *_picture(metrics, kind.alt),
        "| | |",
        "|---|---|",
        f"| trained numbers | {metrics['trained_parameters']:,}{besides} |",
        f"| file | {metrics['adapter_bytes']:,} bytes |",
        f"| steps | {metrics['steps']:,} of {metrics['batch_size']} {kind.noun} of {config['resolution']} pixels a side |",
        f"| seed | {config['seed']} |",
        "",
        *_code(config, base, repository, pipeline, imports, code),
        "",
        "The adapter has the licence of the base model at least, and the data's: neither is in here.",
    ]
    return "\n".join(said) + "\n"


def _code(
    config: Mapping[str, Any], base: str, repository: str, pipeline: str, imports: Sequence[str], code: Sequence[str]
) -> list[str]:
    return [
        "```python",
        "import loca_vision.diffusers",
        f"from diffusers import {pipeline}",
        *imports,
        "",
        f"pipe = {pipeline}.from_pretrained({_source(config, base)})",
        *_scheduler(config),
        f'pipe.load_loca_weights("{repository}")',
        *code,
        "```",
    ]


def name_of(place: str) -> tuple[str, bool]:
    """Return the public name of a base or data set, and whether it was a local folder."""
    local = tells_a_place(place) or Path(place).exists()  # the folder may no longer exist
    return (Path(redact(place)).name, True) if local else (place, False)


def _data(place: str, kind: Kind) -> str:
    """Return the data set as a link to the hub, or as the name of a folder."""
    name, local = name_of(place)
    return f"a folder of {kind.noun}, {name}" if local else f"[{name}](https://huggingface.co/datasets/{name})"


def _source(config: Mapping[str, Any], base: str) -> str:
    """Return the arguments that load the base as it was in training."""
    more = (f', {name}="{config[name]}"' for name in ("revision", "variant") if config[name])
    return f'"{base}"' + "".join(more)


def _scheduler(config: Mapping[str, Any]) -> list[str]:
    """Return a line of code for the scheduler, if the adapter was trained to predict something other than it expects."""
    kind = config["prediction_type"]
    told = f'pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="{kind}")'
    return [told] if kind else []


def arguments_of(settings: Mapping[str, Any]) -> str:
    """Return settings as the arguments of a call, without those that are None and thus left to the pipeline."""
    return ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)


def _picture(metrics: Mapping[str, Any], alt: str) -> list[str]:
    """Return the validation picture, if there is one."""
    return [f"![{alt}]({metrics['validation_picture']})", ""] if metrics["validation_picture"] else []


def _metadata(config: Mapping[str, Any], place: str, title: str, base: str | None, kind: Kind) -> str:
    """Return the metadata by the hub's conventions for diffusers adapters."""
    from huggingface_hub import ModelCardData

    name, local = name_of(place)
    data: str = ModelCardData(
        library_name="diffusers",
        pipeline_tag=kind.task,
        license="other",
        license_name="of-the-base-model-and-the-data",
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=None if local else [name],
        tags=[*kind.tags, "loca-vision", config["method"]],
        model_name=title,
    ).to_yaml()
    return data
