"""What is in an adapter file, as text; no model is needed."""

from __future__ import annotations

import math
import os

import torch

from loca_vision.adapter_file import check_values, read_description
from loca_vision.checkpoint import file_to_read
from loca_vision.safefile import open_safetensors
from loca_vision.tables import aligned


def describe(path: str | os.PathLike[str]) -> str:
    """The file's settings, then a line for each projection: (p, q), components, cells used, Frobenius norm of the update.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`, short of what only a model can tell.
    """
    with open_safetensors(file_to_read(path)) as opened:
        about = read_description(opened.metadata, opened.entries)
        tensors = opened.tensors()
        size = opened.path.stat().st_size
    check_values(tensors, about)
    rows = [("projection", "shape", "components", "cells", "norm")]
    for projection, shape in about.shapes.items():
        cells, which = torch.unique(tensors[f"{projection}.locations"].long(), return_inverse=True)
        coefficients = tensors[f"{projection}.coefficients"].double()
        # Atoms are orthonormal, so the norm is that of the spectrum, once components at one cell are added up.
        norm = abs(about.config_for(projection).scale) * math.sqrt(
            float(torch.zeros(len(cells)).double().index_add(0, which, coefficients).square().sum())
        )
        rows.append((projection, f"{shape[0]} x {shape[1]}", str(len(coefficients)), str(len(cells)), f"{norm:.4g}"))
    whole = {key.removeprefix("full."): tuple(value.shape) for key, value in tensors.items() if key.startswith("full.")}
    head = [
        f"{opened.path}: {size:,} bytes, adapter {about.name!r} of {about.base_model}, by loca-vision {about.library_version}",
        *(
            f"{f'{component}: ' if component else ''}targets {', '.join(c.targets)}; scale {c.scale:g}; seed {c.seed}"
            for component, c in about.configs.items()
        ),
        *(f"trained whole: {name} {shape}" for name, shape in whole.items()),
    ]
    return "\n".join([*head, "", aligned(rows, str.ljust)])
