"""Read files of version 2, in which components are packed, as version 1 would have them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loca_vision.formats.adapter_file import (
    FIELDS,
    FORMAT_VERSION,
    METADATA_KEY,
    Description,
    check_fields,
    description_of,
    said_in,
)
from loca_vision.formats.opened import InMemory, Opened
from loca_vision.formats.packed.gaps import Row, check_size, unpacked_cells
from loca_vision.formats.packed.numbers import MAX_TABLE, NUMBERS, from_planes, in_bytes, inflated, most_deflated
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.sparse_config import SparseConfig
from loca_vision.storage.safetensors_file import Entry, OpenFile, open_safetensors
from loca_vision.storage.strict_json import strict_json

PACKED_VERSION = 2
PACKED_FIELDS = FIELDS - {"shapes"} | {"coefficients"}
TABLE, CELLS, COEFFICIENTS, SCALES = "projections", "cells", "coefficients", "scales"


@contextmanager
def open_adapter(path: Path) -> Iterator[Opened]:
    """Open an adapter of any format version as version 1 would have it; see `open_safetensors`.

    Raises:
        FileNotFoundError, ValueError: as there; or the description of the packed components is not sound.
    """
    with open_safetensors(path) as file:
        yield unpacked(file)


def unpacked(source: OpenFile | InMemory) -> Opened:
    """Return the source itself or, for version 2, its equivalent in version 1, whose numbers are unpacked when read.

    Raises:
        ValueError: the headers or the table of projections are not sound.
    """
    if METADATA_KEY not in source.metadata:
        return source
    said = said_in(source.metadata)
    return _opened(source, said) if said["format_version"] == PACKED_VERSION else source


def can_be_packed(config: AdapterConfig) -> bool:
    """Return whether files of the method hold coefficients and locations of every projection, and nothing else of it."""
    return isinstance(config, SparseConfig) and type(config).file_layout is SparseConfig.file_layout


@dataclass(frozen=True)
class PackedFile:
    """A file of version 2.

    Args:
        source: the file or state dict that contains it.
        entries, metadata: as version 1 would have them.
        rows: its projections, in the order of the numbers.
        stored: how the coefficients are stored, a key of `NUMBERS`.
    """

    source: OpenFile | InMemory
    entries: dict[str, Entry]
    metadata: dict[str, str]
    rows: tuple[Row, ...]
    stored: str

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors as in version 1: float16 coefficients, or float32 ones from 8-bit numbers, and int32 locations.

        Raises:
            ValueError: the packed numbers are not sound.
        """
        with torch.device("cpu"):  # whatever default device the caller has set
            return self._unpacked(self.source.tensors())

    def _unpacked(self, held: dict[str, Tensor]) -> dict[str, Tensor]:
        cells, values = unpacked_cells(held.pop(CELLS), self.rows), self._coefficients(held.pop(COEFFICIENTS))
        if self.stored == "int8":
            values = [one.float() * scale for one, scale in zip(values, held.pop(SCALES), strict=True)]
        del held[TABLE]
        for row, own, flat in zip(self.rows, values, cells, strict=True):
            held |= {f"{row.name}.coefficients": own.clone(), f"{row.name}.locations": flat}
        return held

    def _coefficients(self, data: Tensor) -> list[Tensor]:
        counts, dtype = [row.count for row in self.rows], NUMBERS[self.stored]
        size = sum(counts) * dtype.itemsize
        found = inflated(COEFFICIENTS, data, size)
        if len(found) < size:
            raise ValueError(f"coefficients has {len(found)} bytes in its zlib stream, where {size} were due")
        numbers = in_bytes(found)
        return list((from_planes(numbers) if dtype == torch.float16 else numbers.view(dtype)).split_with_sizes(counts))


def _opened(source: OpenFile | InMemory, said: dict[str, Any]) -> PackedFile:
    check_fields(said, PACKED_FIELDS)
    stored = said.pop("coefficients")
    if not isinstance(stored, str) or stored not in NUMBERS:
        raise ValueError(f"coefficients={stored!r}: they are stored as {' or '.join(NUMBERS)}")
    _check_keys(source.entries, stored)
    _check_stream(source.entries, TABLE, MAX_TABLE)
    table = _table(inflated(TABLE, source.tensor(TABLE), MAX_TABLE))
    counts = {name: row[-1] for name, row in table.items()}
    said |= {"format_version": FORMAT_VERSION, "shapes": {name: row[:-1] for name, row in table.items()}}
    said["config"] = _with_counts(said["config"], counts)
    about = description_of(said)
    if not all(map(can_be_packed, about.configs.values())):
        raise ValueError(f"method={about.method!r}: version 2 is for coefficients at locations")
    rows = tuple(Row(name, about.shapes[name], counts[name]) for name in about.shapes)
    entries = _entries(about, rows, stored)
    _check_sizes(source.entries, rows, stored)
    whole = {key: replace(entry, start=0, end=0) for key, entry in source.entries.items() if key.startswith("full.")}
    return PackedFile(source, whole | entries, {METADATA_KEY: json.dumps(said)}, rows, stored)


def _check_keys(entries: Mapping[str, Entry], stored: str) -> None:
    """Check that the packed tensors are there with their dtypes, and that any others are whole tensors, as in version 1."""
    dtypes = {TABLE: "U8", CELLS: "U8", COEFFICIENTS: "U8"} | ({SCALES: "F32"} if stored == "int8" else {})
    for key, dtype in dtypes.items():
        if key not in entries:
            raise ValueError(f"the tensor {key} is missing")
        if entries[key].dtype != dtype or len(entries[key].shape) != 1:
            raise ValueError(f"{key} has dtype {entries[key].dtype} and shape {entries[key].shape}: expected a row of {dtype}")
    for key in entries:
        if key not in dtypes and not key.startswith("full."):
            raise ValueError(f"the tensor {key} is unknown")


def _table(data: bytes) -> dict[str, list[Any]]:
    """Return each projection's shape followed by its number of components; `description_of` checks the shapes."""
    table = strict_json(data.decode("utf-8"))
    if not isinstance(table, dict):
        raise ValueError(f"{TABLE} is not an object of projections")
    for name, row in table.items():
        if not isinstance(row, list) or not row or type(row[-1]) is not int or row[-1] < 1:
            raise ValueError(f"{TABLE}[{name!r}]={row!r}: its shape and then its number of components, from 1 up")
    return table


def _with_counts(config: Any, counts: Mapping[str, int]) -> Any:
    """Return the settings, of a model or by component, with the table's counts where `n_components` is null."""
    if not isinstance(config, dict) or "targets" in config:
        return _filled(config, counts)
    parts: dict[str, dict[str, int]] = {component: {} for component in config}
    for name, count in counts.items():
        component, _, projection = name.partition(".")
        parts.setdefault(component, {})[projection] = count
    return {component: _filled(part, parts[component]) for component, part in config.items()}


def _filled(config: Any, counts: Mapping[str, int]) -> Any:
    if not isinstance(config, dict) or "n_components" not in config:
        return config  # `description_of` will refuse it
    if isinstance(config["n_components"], dict):
        raise ValueError("config: n_components is a whole number, or null where the table of projections has the counts")
    return config | {"n_components": dict(counts)} if config["n_components"] is None else config


def _entries(about: Description, rows: tuple[Row, ...], stored: str) -> dict[str, Entry]:
    """Return the entries that version 1 would have."""
    layout = about.file_layout()
    for row in rows:
        (count,) = layout[f"{row.name}.coefficients"].shape
        if row.count != count:
            raise ValueError(f"{TABLE}[{row.name!r}] has {row.count} components: by the settings it has {count}")
    numbers = "F16" if stored == "float16" else "F32"
    return {key: Entry("I32" if must.cells_of else numbers, must.shape, 0, 0) for key, must in layout.items()}


def _check_sizes(entries: Mapping[str, Entry], rows: tuple[Row, ...], stored: str) -> None:
    """Check by headers alone, before the bytes are read, that there are as many as the components need."""
    check_size(entries[CELLS].shape[0], rows)
    _check_stream(entries, COEFFICIENTS, sum(row.count for row in rows) * NUMBERS[stored].itemsize)
    if SCALES in entries and entries[SCALES].shape != (len(rows),):
        raise ValueError(f"{SCALES} has shape {entries[SCALES].shape}: the file has {len(rows)} projections")


def _check_stream(entries: Mapping[str, Entry], key: str, size: int) -> None:
    if entries[key].shape[0] > most_deflated(size):
        raise ValueError(f"{key} has {entries[key].shape[0]} bytes: a stream of {size} takes at most {most_deflated(size)}")
