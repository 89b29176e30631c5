"""Save one adapter of all of a pipeline's components into one file."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loca_vision.formats.adapter_file import joined, with_prefix
from loca_vision.formats.match_model import base_model_name
from loca_vision.formats.save_load import check_stored, contents, write_adapter
from loca_vision.formats.sources import safe_name
from loca_vision.pipeline.components import active_in, adapted_in, check_names


def save_pipeline_adapter(
    pipe: Any,
    directory: str | os.PathLike[str],
    adapter_name: str | None = None,
    weight_name: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Implement `LoCALoaderMixin.save_loca_weights`.

    Raises:
        ValueError, OSError: as there.
    """
    check_stored(dtype)
    file = Path(directory) / safe_name(weight_name)
    if Path(directory).exists() and not Path(directory).is_dir():
        raise NotADirectoryError(f"{directory}: expected a folder, got a file")
    if Path(directory).suffix == ".safetensors" and not Path(directory).is_dir():
        raise ValueError(f"directory={str(directory)!r}: expected a folder; weight_name is the name of the file in it")
    if adapter_name is None:
        active = active_in(pipe)
        if len(active) != 1:
            raise ValueError(f"adapter_name=None: {len(active)} adapters are active; name the one to save")
        adapter_name = active[0]
    models = {c: model for c, (model, record) in adapted_in(pipe).items() if adapter_name in record.adapters}
    check_names(pipe, [adapter_name])
    parts = {component: contents(model, adapter_name, dtype) for component, model in models.items()}
    parts = {component: part for component, part in parts.items() if part[0].shapes}  # a swap may have left a component empty
    about = joined({component: part for component, (part, _) in parts.items()}, _base_name(pipe, models))
    tensors = {key: value for c, (_, own) in parts.items() for key, value in with_prefix(own, c).items()}
    write_adapter(file, about, tensors, dtype)
    return file


def _base_name(pipe: Any, models: Mapping[str, nn.Module]) -> str:
    """Return the hub repository that the pipeline or its adapted model came from, or the model's class; never a path."""
    model = next((models[name] for name in ("unet", "transformer") if name in models), next(iter(models.values())))
    for owner in (pipe, model):
        name = getattr(getattr(owner, "config", None), "_name_or_path", None)
        if not isinstance(name, str):
            continue
        cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", name)
        if cached:
            return "/".join(cached.groups())
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists():
            return name
    return base_model_name(model)
