"""Read safetensors files from untrusted sources strictly, and write them atomically. Nothing is ever unpickled."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from torch import Tensor

from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.strict_json import MAX_HEADER, _check_regular, _one_line, strict_json

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
EIGHT_BITS = ("F8_E4M3", "F8_E5M2")  # torch does not compute with these, so only code that converts them asks for them
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")  # suffixes of files that could run code when read
_PICKLE_MARKS = {b"PK\x03\x04": "a PyTorch archive"} | {bytes((0x80, protocol)): "a pickle" for protocol in range(2, 6)}
MAX_AXES = 8  # the product of thousands of sizes would take minutes
_MAX_NESTING = 8


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it: dtype ("F32", ...), shape, and its bytes in the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class OpenFile:
    """An open file whose header has been checked."""

    path: Path
    header: bytes
    entries: dict[str, Entry]
    metadata: dict[str, str]
    file: BinaryIO

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors in their own memory, so that a file that shrinks later cannot crash the process."""
        self.file.seek(0)
        data = self.file.read(len(self.header) + max((entry.end for entry in self.entries.values()), default=0))
        if not data.startswith(self.header):
            raise ValueError("it was changed while it was read")
        try:
            return safetensors.torch.load(data)
        except Exception as error:  # the library raises its own type, over several versions
            raise ValueError(str(error)) from error

    def tensor(self, name: str) -> Tensor:
        """Return one tensor in its own memory, reading no more of the file than that.

        Raises:
            KeyError: there is no tensor with that name.
            ValueError: the file has become shorter.
        """
        entry = self.entries[name]
        self.file.seek(len(self.header) + entry.start)
        data = self.file.read(entry.end - entry.start)
        if len(data) < entry.end - entry.start:
            raise ValueError("it was changed while it was read")
        about = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [0, len(data)]}
        header = json.dumps({"tensor": about}).encode()
        return safetensors.torch.load(len(header).to_bytes(8, "little") + header + data)["tensor"]


@contextmanager
def open_safetensors(path: Path, *, eight_bits: bool = False) -> Iterator[OpenFile]:
    """Open a regular file and check its whole header against its size before any tensor is read.

    ValueErrors and TypeErrors raised inside the context count as errors of this file: they become a ValueError whose message
    begins with the path.

    Args:
        path: the file to open.
        eight_bits: whether 8-bit floating-point numbers are allowed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a regular file or not a valid safetensors file; the message says where the fault is.
    """
    _check_regular(path)
    dtypes = _SIZES | dict.fromkeys(EIGHT_BITS if eight_bits else (), 1)
    with path.open("rb") as file:
        try:
            yield _opened(path, file, os.fstat(file.fileno()).st_size, dtypes)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: {_one_line(str(error))}") from None


def tensors_like(path: Path, known: OpenFile) -> dict[str, Tensor] | None:
    """Return the tensors of a file whose size and header, byte for byte, are those of a file checked before, or None.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file was changed while it was read.
    """
    _check_regular(path)
    with path.open("rb") as file:
        size = len(known.header) + max((entry.end for entry in known.entries.values()), default=0)
        alike = os.fstat(file.fileno()).st_size == size and file.read(len(known.header)) == known.header
        return replace(known, path=path, file=file).tensors() if alike else None


def may_be_read(file: Path, folder: Path) -> bool:
    """Whether a file of a folder, after following all links, lies in that folder.

    For a snapshot in the hub's cache, it may also lie in the `blobs` folder that the snapshot's files link to.
    """
    there = folder.resolve()
    roots = [there]
    for snapshots in there.parents:
        blobs = snapshots.parent / "blobs"
        if snapshots.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            roots.append(blobs)
    return any(file.resolve().is_relative_to(root) for root in roots)


def _opened(path: Path, file: BinaryIO, size: int, dtypes: Mapping[str, int]) -> OpenFile:
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:  # look for a pickle only here, because a header of 640 bytes begins like one
        kind = next((kind for mark, kind in _PICKLE_MARKS.items() if start.startswith(mark)), None)
        if kind:
            raise ValueError(f"it is {kind}, which could run code when read; adapters are safetensors files")
        raise ValueError("it is not a safetensors file, or cut short: the header does not fit into it")
    if length > MAX_HEADER:
        raise ValueError(f"the header has {length} bytes, of at most {MAX_HEADER}")
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise ValueError("the header does not begin with '{'")
    fields = strict_json(raw.decode("utf-8"))
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the header's __metadata__ is not a table of texts")
    entries = {name: _entry(name, fields[name], dtypes) for name in fields}
    _check_cover(entries, size - 8 - length)
    return OpenFile(path, start + raw, entries, metadata, file)


def _entry(name: str, fields: Any, dtypes: Mapping[str, int]) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r}: a tensor has dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise ValueError(f"{name!r}: dtype {dtype!r} is not one of {', '.join(dtypes)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r}: shape and data_offsets are lists of whole numbers from 0 up")
    if len(shape) > MAX_AXES:
        raise ValueError(f"{name!r}: {len(shape)} axes, of at most {MAX_AXES}")
    if offsets[1] - offsets[0] != math.prod(shape) * dtypes[dtype]:
        raise ValueError(f"{name!r}: {offsets[1] - offsets[0]} bytes for {shape} of {dtype}")
    return Entry(dtype, tuple(shape), *offsets)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_cover(entries: dict[str, Entry], data: int) -> None:
    """Check that the tensors follow one another over the whole data section, without gap, overlap or remainder."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise ValueError(f"{name!r}: its data starts at byte {entry.start}, where {end} was due")
        end = entry.end
    if end != data:
        raise ValueError(f"the tensors fill {end} bytes, the file holds {data}")


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically, as `write_atomically` does."""
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def in_sixteen_bits(tensor: Tensor) -> Tensor:
    """Return an 8-bit floating-point tensor in float16, which is lossless, and any other tensor unchanged."""
    return tensor.half() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def refuse_pickle(path: Path) -> None:
    """Raise `ValueError` if the path has the suffix of a pickle."""
    if path.suffix in PICKLES:
        raise ValueError(f"{path}: it ends like a pickle, which could run code when read; expected a safetensors file")


def pickle_hint(names: Iterable[str]) -> str:
    """Return the end of a message about a missing safetensors file: a hint about a pickle found instead, or ""."""
    name = next((name for name in sorted(names) if name.endswith(PICKLES)), None)
    return f"; {name} is there, but a pickle could run code when read" if name else ""
