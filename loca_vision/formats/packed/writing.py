"""Version 2 of the adapter file: components packed into a third of the bytes."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loca_vision.formats.adapter_file import METADATA_KEY, Description, as_json, check_values, component_of
from loca_vision.formats.opened import InMemory
from loca_vision.formats.packed.gaps import Row, packed_cells
from loca_vision.formats.packed.numbers import NUMBERS, deflated, in_bytes, in_eight_bits, planes
from loca_vision.formats.packed.reading import CELLS, COEFFICIENTS, PACKED_VERSION, SCALES, TABLE, unpacked
from loca_vision.methods.sparse_config import SparseConfig

_LOG = logging.getLogger(__name__)


def packed(about: Description, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of version 2, after reading them back as a check.

    Args:
        about: the description of an adapter for whose settings `can_be_packed` holds.
        tensors: the tensors as in version 1.
        dtype: the dtype of the coefficients, float16 or int8. The error of the 8 bits is logged.

    Raises:
        ValueError: a value cannot be stored in this dtype.
    """
    stored = next(name for name, known in NUMBERS.items() if known == dtype)
    rows = [Row(name, shape, len(tensors[f"{name}.locations"])) for name, shape in about.shapes.items()]
    order = {row.name: tensors[f"{row.name}.locations"].long().sort(stable=True) for row in rows}
    values = [tensors[f"{row.name}.coefficients"][order[row.name].indices] for row in rows]
    found = {f"full.{name}": tensors[f"full.{name}"] for name in about.whole}
    found |= {TABLE: _table(about, rows), CELLS: packed_cells([order[row.name].values for row in rows], rows)}
    if dtype == torch.int8:
        whole, scales = in_eight_bits(values)
        found |= {COEFFICIENTS: deflated(whole.view(torch.uint8)), SCALES: scales}
    else:
        found[COEFFICIENTS] = deflated(*planes(torch.cat(values).half()))
    metadata = {METADATA_KEY: json.dumps(_said(about, stored), separators=(",", ":"))}
    read = unpacked(InMemory.of(found | metadata)).tensors()
    check_values(read, about)
    if dtype == torch.int8:
        lost = _lost(about, {row.name: own for row, own in zip(rows, values, strict=True)}, read)
        _LOG.warning("in 8 bits the coefficients differ by %.2f %% (root mean square) from those in memory", 100 * lost)
    return found, metadata


def _table(about: Description, rows: list[Row]) -> Tensor:
    table = {row.name: [*row.shape, *([1, 1] if row.name in about.convolutions else []), row.count] for row in rows}
    return deflated(in_bytes(json.dumps(table, separators=(",", ":")).encode()))


def _said(about: Description, stored: str) -> dict[str, Any]:
    """Return the metadata, without what the table contains."""
    said = as_json(about) | {"format_version": PACKED_VERSION, "coefficients": stored}
    del said["shapes"]
    configs = said["config"] if "" not in about.configs else {"": said["config"]}
    for config in configs.values():
        if isinstance(config["n_components"], dict):
            config["n_components"] = None
    return said


def _lost(about: Description, values: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> float:
    """Return the root mean square error of the stored coefficients over that of the coefficients, each times its scale."""
    lacking = held = 0.0
    for name, own in values.items():
        config = about.configs[component_of(name, about.configs)]
        assert isinstance(config, SparseConfig)
        lacking += config.scale**2 * float((own.double() - read[f"{name}.coefficients"]).square().sum())
        held += config.scale**2 * float(own.double().square().sum())
    return math.sqrt(lacking / held) if held else 0.0
