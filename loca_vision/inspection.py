"""What is in an adapter file, as text; no model is needed."""

from __future__ import annotations

import os
from collections.abc import Mapping

from loca_vision.adapter_file import check_values, component_of, read_description
from loca_vision.checkpoint import file_to_read
from loca_vision.kinds import AdapterConfig
from loca_vision.safefile import open_safetensors
from loca_vision.tables import aligned


def describe(path: str | os.PathLike[str]) -> str:
    """The file's settings, then a line for each projection: (p, q), trained numbers, Frobenius norm of the update, which
    that of a weight-decomposed one does not tell.

    Raises:
        FileNotFoundError, ValueError: as `load_adapter`, short of what only a model can tell.
    """
    with open_safetensors(file_to_read(path)) as opened:
        about = read_description(opened.metadata, opened.entries)
        tensors = opened.tensors()
        size = opened.path.stat().st_size
        check_values(tensors, about)
    rows = [("projection", "shape", "trained", "norm")]
    for projection, shape in about.shapes.items():
        config = about.configs[component_of(projection, about.configs)]
        update = config.restored(projection, shape, tensors)
        norm = update.norm()
        trained = sum(p.numel() for p in update.learned())
        rows.append((projection, f"{shape[0]} x {shape[1]}", str(trained), "-" if norm is None else f"{norm:.4g}"))
    whole = {key.removeprefix("full."): tuple(value.shape) for key, value in tensors.items() if key.startswith("full.")}
    head = [
        f"{opened.path}: {size:,} bytes, adapter {about.name!r} of {about.base_model}, by loca-vision {about.library_version}",
        *(
            f"{f'{component}: ' if component else ''}{config.method}; {_settings(config)}"
            for component, config in about.configs.items()
        ),
        *(f"trained whole: {name} {shape}" for name, shape in whole.items()),
    ]
    return "\n".join([*head, "", aligned(rows, str.ljust)])


def _settings(config: AdapterConfig) -> str:
    """All fields on one line; counts by projection are in the table."""
    fields = {name: value for name, value in config.as_json().items() if not isinstance(value, Mapping)}
    return "; ".join(f"{name} {', '.join(value) if name == 'targets' else value}" for name, value in fields.items())
