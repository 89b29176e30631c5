"""safetensors files that come from anywhere: read strictly, written atomically and durably. Nothing is ever unpickled."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from torch import Tensor

MAX_HEADER = 8 * 2**20
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_PICKLES = {b"PK\x03\x04": "a PyTorch archive", b"\x80\x02": "a pickle", b"\x80\x04": "a pickle", b"\x80\x05": "a pickle"}


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it: dtype ("F32", ...), shape, and its bytes in the data section."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class OpenFile:
    """A checked header, and the file it came from."""

    path: Path
    entries: dict[str, Entry]
    metadata: dict[str, str]
    file: BinaryIO

    def tensors(self) -> dict[str, Tensor]:
        """All tensors, in memory of their own: a file that shrinks later cannot take the process along."""
        self.file.seek(0)
        try:
            return safetensors.torch.load(self.file.read())
        except Exception as error:  # the library raises its own type, over several versions
            raise ValueError(f"{self.path}: {error}") from error


@contextmanager
def open_safetensors(path: Path) -> Iterator[OpenFile]:
    """Open a regular file and check its whole header against its size, before any tensor is read.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no regular file, or not a sound safetensors file; the sentence says where.
    """
    if "\0" in str(path):
        raise ValueError(f"{str(path)!r}: a path holds no NUL character")
    if not path.exists():
        raise FileNotFoundError(f"{path}: there is no such file")
    if not stat.S_ISREG(path.stat().st_mode):  # a FIFO would hang on opening
        raise ValueError(f"{path}: it is not a regular file")
    with path.open("rb") as file:
        try:
            entries, metadata = _header(file, os.fstat(file.fileno()).st_size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        yield OpenFile(path, entries, metadata, file)


def _header(file: BinaryIO, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    start = file.read(8)
    for mark, kind in _PICKLES.items():
        if start.startswith(mark):
            raise ValueError(f"it is {kind}, which could run code when read; adapters are safetensors files")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
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
    entries = {name: _entry(name, fields[name]) for name in fields}
    _check_cover(entries, size - 8 - length)
    return entries, metadata


def strict_json(text: str) -> Any:
    """The value of a JSON text without repeated keys, NaN, infinity or absurd nesting.

    Raises:
        ValueError: it is not such a text.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return table


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not a JSON number")


def _entry(name: str, fields: Any) -> Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r}: a tensor has dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise ValueError(f"{name!r}: dtype {dtype!r} is not one of {', '.join(_SIZES)}")
    if not _whole_numbers(shape) or not _whole_numbers(offsets) or len(offsets) != 2:
        raise ValueError(f"{name!r}: shape and data_offsets are lists of whole numbers from 0 up")
    if offsets[1] - offsets[0] != math.prod(shape) * _SIZES[dtype]:
        raise ValueError(f"{name!r}: {offsets[1] - offsets[0]} bytes for {shape} of {dtype}")
    return Entry(dtype, tuple(shape), *offsets)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _check_cover(entries: dict[str, Entry], data: int) -> None:
    """The tensors lie one after the other over the whole data section, with no gap, overlap or rest."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != end:
            raise ValueError(f"{name!r}: its data starts at byte {entry.start}, where {end} was due")
        end = entry.end
    if end != data:
        raise ValueError(f"the tensors fill {end} bytes, the file holds {data}")


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file as `write_atomically` does."""
    write_atomically(path, safetensors.torch.save(tensors, metadata))


def write_atomically(path: Path, data: bytes) -> None:
    """Write so that a crash, at any moment, leaves the old file or the new one, and the new one stays.

    The umask is respected, and a symbolic link is written through. What a killed process left behind is cleaned.

    Raises:
        OSError: it could not be written; what was there is as it was.
    """
    target = path.resolve()
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean(target)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        _sync_folder(target.parent)
    except OSError as error:
        raise type(error)(f"{path}: it could not be written ({error.strerror}); what was there is as it was") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _clean(target: Path) -> None:
    """Remove the temporary files of processes that are no more."""
    for left in target.parent.iterdir():
        owner = re.fullmatch(re.escape(f".{target.name}.") + r"(\d+)-\d+\.tmp", left.name)
        if owner and not _alive(int(owner[1])):
            left.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    if os.name != "posix":  # elsewhere signal 0 is no question
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
