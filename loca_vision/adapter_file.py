"""The adapter file: one safetensors file whose header says what it is, and what must hold of it, whatever the model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from loca_vision.config import LoCAConfig
from loca_vision.safefile import Entry, strict_json

FILE_NAME = "pytorch_loca_weights.safetensors"
METADATA_KEY = "loca_adapter_metadata"
FORMAT_VERSION = 1
_FIELDS = {"format_version", "method", "name", "config", "shapes", "whole", "base_model", "library_version"}
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Description:
    """What the header of an adapter file says.

    Args:
        config: the adapter's settings; where counts differ, `n_components` names each projection.
        shapes: (p, q) of each projection.
        whole: names of the parameters trained whole beside them.
        name, base_model, library_version: of the adapter, of what it was trained on, and of what wrote it.
    """

    config: LoCAConfig
    shapes: dict[str, tuple[int, int]]
    whole: tuple[str, ...]
    name: str
    base_model: str
    library_version: str


def as_json(about: Description) -> dict[str, Any]:
    """The metadata, from which `read_description` makes an equal description."""
    return {"format_version": FORMAT_VERSION, "method": "loca"} | vars(about) | {"config": about.config.as_json()}


def read_description(metadata: dict[str, str], entries: dict[str, Entry]) -> Description:
    """Check header and metadata against each other, without a model.

    Raises:
        ValueError: naming the key and the rule.
    """
    if METADATA_KEY not in metadata:
        raise ValueError(f"it is no LoCA adapter: the header has no {METADATA_KEY}")
    fields = strict_json(metadata[METADATA_KEY])
    if not isinstance(fields, dict) or type(fields.get("format_version")) is not int:
        raise ValueError(f"{METADATA_KEY}: it is not an object with a format_version")
    if fields["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version={fields['format_version']}: this library reads version {FORMAT_VERSION}")
    if set(fields) != _FIELDS:
        raise ValueError(f"{METADATA_KEY}: the fields {sorted(set(fields) ^ _FIELDS)} are missing or unknown")
    if fields["method"] != "loca":
        raise ValueError(f"method={fields['method']!r}: this library reads 'loca'")
    for field in ("name", "base_model", "library_version"):
        if not isinstance(fields[field], str):
            raise ValueError(f"{field}={fields[field]!r}: it is a text")
    shapes, whole = _shapes(fields["shapes"]), _whole(fields["whole"])
    config = _config(fields["config"], shapes)
    _check_names(entries, shapes, whole)
    _check_components(entries, config, shapes)
    return Description(config, shapes, whole, fields["name"], fields["base_model"], fields["library_version"])


def _shapes(fields: Any) -> dict[str, tuple[int, int]]:
    if not isinstance(fields, dict) or not fields:
        raise ValueError("shapes: it names no projection")
    for projection, shape in fields.items():
        whole = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
        if not whole or math.prod(shape) > 2**31:
            raise ValueError(f"shapes[{projection!r}]={shape!r}: two whole numbers from 1 up, with at most 2**31 cells")
    return {projection: tuple(shape) for projection, shape in fields.items()}


def _config(fields: Any, shapes: dict[str, tuple[int, int]]) -> LoCAConfig:
    known = LoCAConfig().as_json()
    if not isinstance(fields, dict) or set(fields) != set(known):
        raise ValueError(f"config: its fields are {', '.join(known)}, all of them and no others")
    config = LoCAConfig(**fields)
    counts = config.n_components
    if isinstance(counts, dict) and set(counts) != set(shapes):
        raise ValueError("config: n_components does not name the projections of the file")
    return config


def _whole(fields: Any) -> tuple[str, ...]:
    texts = isinstance(fields, list) and all(isinstance(name, str) for name in fields)
    if not texts or len(set(fields)) < len(fields):
        raise ValueError(f"whole={fields!r}: a list of different parameter names")
    return tuple(fields)


def _check_names(entries: dict[str, Entry], shapes: dict[str, tuple[int, int]], whole: tuple[str, ...]) -> None:
    wanted = {f"{projection}.{kind}" for projection in shapes for kind in ("coefficients", "locations")}
    wanted |= {f"full.{name}" for name in whole}
    for key in sorted(wanted - set(entries)):
        raise ValueError(f"the tensor {key} is missing")
    for key in entries:
        if key not in wanted:
            raise ValueError(f"the tensor {key} is unknown{nearest(key, wanted)}")


def _check_components(entries: dict[str, Entry], config: LoCAConfig, shapes: dict[str, tuple[int, int]]) -> None:
    for projection, (rows, cols) in shapes.items():
        counts = config.n_components
        count = counts if isinstance(counts, int) else counts[projection]
        if count > rows * cols:
            raise ValueError(f"{projection} has {count} components, of {rows} x {cols} = {rows * cols} cells")
        for kind, dtypes in (("coefficients", ("F32", "F16")), ("locations", ("I32",))):
            entry = entries[f"{projection}.{kind}"]
            if entry.dtype not in dtypes:
                raise ValueError(f"{projection}.{kind} has dtype {entry.dtype}: it is {' or '.join(dtypes)}")
            if entry.shape != (count,):
                raise ValueError(f"{projection}.{kind} has shape {entry.shape}: n_components says ({count},)")


def check_values(tensors: dict[str, Tensor], about: Description) -> None:
    """Finite numbers, also as an update, and locations inside their matrices.

    Raises:
        ValueError: naming the key and the rule.
    """
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{key} holds NaN or infinity as {value.dtype}")
    for projection, (rows, cols) in about.shapes.items():
        size = abs(about.config.scale) * tensors[f"{projection}.coefficients"].double().abs().sum()
        if size > torch.finfo(torch.float32).max:
            raise ValueError(f"{projection}.coefficients times the scale {about.config.scale} overflows float32")
        flat = tensors[f"{projection}.locations"].long()
        if flat.min() < 0 or flat.max() >= rows * cols:
            bad = int(flat[(flat < 0) | (flat >= rows * cols)][0])
            raise ValueError(f"{projection}.locations holds {bad}: a {rows} x {cols} matrix has cells 0 to {rows * cols - 1}")


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint; among names of ordinary length and number only, for comparing takes time."""
    close = difflib.get_close_matches(name[:200], [n for n in islice(names, 2000) if len(n) <= 200], n=2)
    return f"; near it are {', '.join(close)}" if close else ""
