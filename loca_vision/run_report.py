"""What a training run leaves behind: metrics.json, the trained tensors, and a picture of its curves."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.atomic import write_atomically
from loca_vision.checkpoint import base_model_name, save_adapter
from loca_vision.safefile import OpenFile, open_safetensors, strict_json, write_safetensors

METRICS = "metrics.json"
TRAINED = "trained_weights.safetensors"  # of methods without an adapter: the head, or the whole model
_TRAINED_KEY = "loca_vision_trained_weights"


def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """`metrics.json` in the folder, whole or not at all."""
    write_atomically(folder / METRICS, (json.dumps(metrics, indent=1, allow_nan=False) + "\n").encode())


def read_metrics(folder: Path) -> dict[str, Any]:
    """Of a finished run.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not what a run writes.
    """
    path = folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; a run that has finished writes it")
    try:
        metrics = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: it is not JSON ({error})") from error
    if not isinstance(metrics, dict) or not isinstance(metrics.get("config"), dict):
        raise ValueError(f"{path}: it is not what a training run writes: it has no config")
    return metrics


def save_trained(model: nn.Module, folder: Path, tensors: Mapping[str, Tensor], *, adapter: bool) -> Path:
    """The adapter with the head; of a method without one, what it trained."""
    if adapter:
        return save_adapter(model, folder)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor.is_floating_point()}
    about = {_TRAINED_KEY: json.dumps({"format_version": 1, "base_model": base_model_name(model), "tensors": sorted(kept)})}
    write_safetensors(folder / TRAINED, kept, about)
    return folder / TRAINED


def load_trained(model: nn.Module, file: str | Path) -> None:
    """Put the tensors of `save_trained` into a model built like the one they are of.

    Raises:
        FileNotFoundError, ValueError: no such file, or its tensors are not the model's; the model is as it was.
    """
    with open_safetensors(Path(file)) as opened:
        own = model.state_dict()
        _check_description(opened, base_model_name(model))
        for name, entry in opened.entries.items():
            if name not in own:
                raise ValueError(f"the model has no tensor {name}")
            if tuple(own[name].shape) != entry.shape:
                raise ValueError(f"{name} is {entry.shape} in the file and {tuple(own[name].shape)} in the model")
        tensors = opened.tensors()
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds NaN or infinity")
        model.load_state_dict({**own, **tensors})


def _check_description(opened: OpenFile, model: str) -> None:
    """What the header says must be what the file holds, and of this model."""
    if _TRAINED_KEY not in opened.metadata:
        raise ValueError(f"it holds no trained weights: the header has no {_TRAINED_KEY}")
    about = strict_json(opened.metadata[_TRAINED_KEY], nesting=2)
    if not isinstance(about, dict) or about.get("format_version") != 1:
        raise ValueError(f"{_TRAINED_KEY}: this version reads format_version 1")
    if about.get("base_model") != model:
        raise ValueError(f"it was trained on {about.get('base_model')}; this model is {model}")
    names = about.get("tensors")
    if names != sorted(opened.entries):
        raise ValueError(f"{_TRAINED_KEY}: the tensors of the file are not those of its header")


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation (of a sample, n - 1) over the runs of several seeds."""
    accuracies = [run["test_accuracy"] for run in runs]
    return {
        "seeds": [run["seed"] for run in runs],
        "test_accuracies": accuracies,
        "test_accuracy": statistics.fmean(accuracies),
        "test_accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        **{name: statistics.fmean(run[name] for run in runs) for name in ("validation_accuracy", "seconds_per_step")},
        **{name: runs[0][name] for name in ("trained_parameters", "location_parameters", "head_parameters", "adapter_bytes")},
    }
