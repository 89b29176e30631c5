"""Packed adapter files (format version 2) read bit by bit, as slowly as the specification reads; and ways to damage them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from support.adapter_files import Breaker, split, tensor

KEY = "loca_adapter_metadata"


def unpacked_by_hand(raw: bytes) -> dict[str, tuple[list[float], list[int]]]:
    """The coefficients and the cells of each projection."""
    text, data = split(raw)
    header = json.loads(text)
    parts = {name: data[slice(*entry["data_offsets"])] for name, entry in header.items() if name != "__metadata__"}
    table = json.loads(zlib.decompress(parts["projections"]))
    stored = json.loads(header["__metadata__"][KEY])["coefficients"]
    numbers = _halves(parts) if stored == "float16" else _small(parts, [row[-1] for row in table.values()])
    cells = _cells(parts["cells"], table)
    return {name: ([next(numbers) for _ in cells[name]], cells[name]) for name in table}


def _cells(data: bytes, table: dict[str, list[int]]) -> dict[str, list[int]]:
    low, high = _bits(data), _bits(data)
    widths = {name: _log2(row[0] * row[1], row[-1]) for name, row in table.items()}
    for _ in range(sum(widths[name] * row[-1] for name, row in table.items())):
        next(high)
    found: dict[str, list[int]] = {}
    for name, row in table.items():
        found[name], cell = [], 0
        for _ in range(row[-1]):
            remainder = sum(next(low) << place for place in range(widths[name]))
            quotient = 0
            while not next(high):
                quotient += 1
            cell += (quotient << widths[name]) + remainder
            found[name].append(cell)
    rest = list(high)
    assert len(rest) < 8 and not any(rest)
    return found


def _log2(cells: int, count: int) -> int:
    """The largest k with 2^k B <= p q."""
    k = 0
    while 2 ** (k + 1) * count <= cells:
        k += 1
    return k


def _bits(data: bytes) -> Iterator[int]:
    for byte in data:
        for place in range(8):
            yield byte >> place & 1


def _halves(parts: dict[str, bytes]) -> Iterator[float]:
    both = zlib.decompress(parts["coefficients"])
    for low, high in zip(both[: len(both) // 2], both[len(both) // 2 :], strict=True):
        yield struct.unpack("<e", bytes((low, high)))[0]


def _small(parts: dict[str, bytes], counts: list[int]) -> Iterator[float]:
    whole = iter(struct.unpack(f"{sum(counts)}b", zlib.decompress(parts["coefficients"])))
    for count, scale in zip(counts, struct.unpack(f"<{len(counts)}f", parts["scales"]), strict=True):
        for _ in range(count):
            yield struct.unpack("<f", struct.pack("<f", next(whole) * scale))[0]  # rounded to float32


def in_stream(key: str, change: Callable[[bytes], bytes]) -> Breaker:
    """Change what is in a zlib stream."""
    return raw_bytes(key, lambda data: zlib.compress(change(zlib.decompress(data))))


def raw_bytes(key: str, change: Callable[[bytes], bytes]) -> Breaker:
    """Change the bytes of a tensor, and the header with them."""

    def changed(old: Tensor) -> Tensor:
        return torch.tensor(list(change(bytes(old.tolist()))), dtype=torch.uint8)

    return tensor(key, changed)


def table(change: Callable[[dict[str, Any]], object]) -> Breaker:
    """Edit the table of projections as a parsed object."""

    def edited(text: bytes) -> bytes:
        rows = json.loads(text)
        change(rows)
        return json.dumps(rows).encode()

    return in_stream("projections", edited)
