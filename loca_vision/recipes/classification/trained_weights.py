"""Weights of runs without an adapter (full training, linear probe): saved and loaded strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from loca_vision.formats.match_model import base_model_name
from loca_vision.formats.save_load import save_adapter
from loca_vision.model.heads import classifier
from loca_vision.storage.safetensors_file import OpenFile, open_safetensors, write_safetensors
from loca_vision.storage.strict_json import strict_json

TRAINED = "trained_weights.safetensors"  # for methods without an adapter: the head, or the whole model
_TRAINED_KEY = "loca_vision_trained_weights"


def save_trained(
    model: nn.Module, folder: Path, tensors: Mapping[str, Tensor], *, adapter: bool, dtype: torch.dtype = torch.float32
) -> Path:
    """Save the adapter with the head, its coefficients in a dtype; for a method without an adapter, what it trained."""
    if adapter:
        return save_adapter(model, folder, dtype=dtype)
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items() if tensor.is_floating_point()}
    about = {_TRAINED_KEY: json.dumps({"format_version": 1, "base_model": base_model_name(model), "tensors": sorted(kept)})}
    write_safetensors(folder / TRAINED, kept, about)
    return folder / TRAINED


def load_trained(model: nn.Module, file: str | Path) -> None:
    """Load the tensors of `save_trained` into a model built like the one they were saved from.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or its tensors are not the model's; the model is unchanged.
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


def load_probe(model: nn.Module, file: str | Path) -> None:
    """Load the head of a linear probe into a model whose head is its own: one without adapters, or with adapters disabled.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it holds anything else than this head; the model is unchanged.
    """
    own = {id(parameter) for parameter in classifier(model)}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in own}
    with open_safetensors(Path(file)) as opened:
        if set(opened.entries) != names:
            raise ValueError(f"expected the head of a linear probe, {', '.join(sorted(names))}")
    load_trained(model, file)


def _check_description(opened: OpenFile, model: str) -> None:
    """Check that the header describes what the file holds, and that the file is for this model."""
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
