"""Coefficients as bytes, with 16 or 8 bits each, and the zlib streams that contain them."""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

NUMBERS = {"float16": torch.float16, "int8": torch.int8}
"""The dtypes in which a file may store coefficients, by their name in its metadata."""
MAX_TABLE = 8 * 2**20  # bytes of JSON, the same as for a header
_MOST = 127  # largest 8-bit coefficient


def deflated(*parts: Tensor) -> Tensor:
    """Compress bytes to one zlib stream (n,) uint8, with each part in its own block so that it gets a suitable code."""
    stream = zlib.compressobj(9)
    pieces = [stream.compress(_bytes_of(part)) + stream.flush(zlib.Z_BLOCK) for part in parts]
    return in_bytes(b"".join(pieces) + stream.flush())


def inflated(key: str, data: Tensor, most: int) -> bytes:
    """Decompress a zlib stream, using no more memory than `most` bytes need.

    Raises:
        ValueError: it is not a zlib stream, or there are more bytes in it or after it.
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
    """Return the largest size accepted for the stream of that many bytes, generous to any writer but not to padding."""
    return 2 * size + 1024


def _bytes_of(data: Tensor) -> bytes:
    """Return the bytes of (n,) uint8 without numpy, which the core does not need, and without a list of objects."""
    held = data.contiguous()
    return ctypes.string_at(held.data_ptr(), len(held)) if len(held) else b""


def in_bytes(data: bytes) -> Tensor:
    """Return (n,) uint8 in memory of its own."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def planes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the low bytes and the high bytes of float16 numbers; the high ones hold little but the sign and the exponent."""
    bits = values.view(torch.int16)
    return (bits & 255).to(torch.uint8), (bits >> 8 & 255).to(torch.uint8)


def from_planes(data: Tensor) -> Tensor:
    """Invert `planes`, given both parts concatenated."""
    low, high = data.to(torch.int16).chunk(2)
    return (low | high << 8).view(torch.float16)


def in_eight_bits(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return all values as whole numbers from -127 to 127, int8, and the scale of each, float32: largest magnitude / 127."""
    scales = torch.stack([one.float().abs().amax() for one in values]) / _MOST
    whole = [
        (one.float() / scale).round().clamp(-_MOST, _MOST) if scale > 0 else torch.zeros_like(one)
        for one, scale in zip(values, scales, strict=True)
    ]
    return torch.cat(whole).to(torch.int8), scales
