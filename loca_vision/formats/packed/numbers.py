"""Coefficients as bytes, in 16 or 8 bits each, and the zlib streams they are in."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

NUMBERS = {"float16": torch.float16, "int8": torch.int8}
"""How the coefficients of a file may be stored, by the name that its metadata has."""
MAX_TABLE = 8 * 2**20  # bytes of JSON, as of a header
_MOST = 127  # of an 8-bit coefficient


def deflated(*parts: Tensor) -> Tensor:
    """One zlib stream (n,) uint8 of bytes, each part in a block of its own, with a code that suits it."""
    stream = zlib.compressobj(9)
    pieces = [stream.compress(_bytes_of(part)) + stream.flush(zlib.Z_BLOCK) for part in parts]
    return in_bytes(b"".join(pieces) + stream.flush())


def inflated(key: str, data: Tensor, most: int) -> bytes:
    """The bytes in a zlib stream, and no more memory than they are allowed to take.

    Raises:
        ValueError: it is not such a stream, or has more bytes in it or behind it.
    """
    stream = zlib.decompressobj()
    try:
        found = stream.decompress(_bytes_of(data), most + 1)
    except zlib.error as error:
        raise ValueError(f"{key} is not a sound zlib stream: {error}") from None
    if len(found) > most:
        raise ValueError(f"{key} has more than {most} bytes in its zlib stream")
    if not stream.eof:
        raise ValueError(f"{key} is not a sound zlib stream: it is cut short")
    if stream.unused_data:
        raise ValueError(f"{key} has {len(stream.unused_data)} bytes behind its zlib stream")
    return found


def most_deflated(size: int) -> int:
    """Bytes that a stream of so many may take, with room for any writer: a file of padding is refused before it is read."""
    return 2 * size + 1024


def _bytes_of(data: Tensor) -> bytes:
    """Of (n,) uint8, without numpy, which the core does not need, and without a list of objects."""
    held = data.contiguous()
    return ctypes.string_at(held.data_ptr(), len(held)) if len(held) else b""


def in_bytes(data: bytes) -> Tensor:
    """(n,) uint8, in memory of its own."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def planes(values: Tensor) -> tuple[Tensor, Tensor]:
    """The low bytes and the high bytes of float16 numbers; the high ones are the sign, the exponent and little else."""
    bits = values.view(torch.int16)
    return (bits & 255).to(torch.uint8), (bits >> 8 & 255).to(torch.uint8)


def from_planes(data: Tensor) -> Tensor:
    """The other way round, from both together."""
    low, high = data.to(torch.int16).chunk(2)
    return (low | high << 8).view(torch.float16)


def in_eight_bits(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 of all, int8, and the scale of each, float32: its largest magnitude / 127."""
    scales = torch.stack([one.float().abs().amax() for one in values]) / _MOST
    whole = [
        (one.float() / scale).round().clamp(-_MOST, _MOST) if scale > 0 else torch.zeros_like(one)
        for one, scale in zip(values, scales, strict=True)
    ]
    return torch.cat(whole).to(torch.int8), scales
