"""The model that `--model` names: its projections, without any weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from loca_vision.layers.projection_rows import ProjectionRows, projections_in


def model_named(name: str | None) -> tuple[list[ProjectionRows] | None, str | None]:
    """Return the projections of a model, which is built without weights, and its full name; (None, None) for None.

    Args:
        name: timm's name, or a folder of transformers with an image classifier's `config.json`.

    Raises:
        ValueError: there is no such model.
    """
    if name is None:
        return None, None
    from loca_vision.formats.match_model import base_model_name

    model = _of_transformers(Path(name)) if Path(name).is_dir() else _of_timm(name)
    return projections_in(model), base_model_name(model)


def _of_timm(name: str) -> nn.Module:
    import timm

    from loca_vision.recipes.classification.models import check_model_name

    check_model_name(name)
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
    return model


def _of_transformers(folder: Path) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: it is not a folder of a transformers model: it has no config.json")
    from transformers import AutoConfig, AutoModelForImageClassification

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model: nn.Module = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    return model
