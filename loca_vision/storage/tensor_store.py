"""Tensors stored on disk under keys, in safetensors files that are written atomically and checked before use."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.safetensors_file import Entry, OpenFile, open_safetensors

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_IDENTITY, _DIGEST = "loca_cache_identity", "loca_cache_sha256"
_BLOCK = 2**20

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardLocation:
    """The location of a tensor: the file, the byte at which its data begin, and its entry."""

    file: Path
    start: int
    entry: Entry


class TensorStore:
    """A store of tensors by key, which returns them bit for bit, including those that the folder already contains.

    A damaged file is removed with a warning in the log, and its keys are then missing. Several processes may add to a folder at
    the same time; each sees what the folder contained when it opened it, and what it has added itself.

    Args:
        folder: the folder; it is created when the first tensors are added.
        identity: everything that the tensors depend on apart from their keys. Files with another identity do not belong in the
            folder.

    Raises:
        ValueError: the folder contains a file with another identity.
        OSError: the folder or a file cannot be read.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder, self.identity = folder, identity
        self.places: dict[str, ShardLocation] = {}
        for file in sorted(folder.glob("shard-*.safetensors")):
            self._take(file)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, key: str) -> Tensor:
        """Return the tensor, on the CPU, in its own memory.

        Raises:
            KeyError: there is no such tensor.
            OSError: its file is missing or has become shorter.
        """
        place = self.places[key]
        with place.file.open("rb") as file:  # read, not mapped, so that a file that shrinks cannot crash the process
            file.seek(place.start)
            data = bytearray(file.read(place.entry.end - place.entry.start))
        if len(data) < place.entry.end - place.entry.start:
            raise OSError(f"{place.file}: it was cut short since it was opened; start again, and it is made anew")
        return torch.frombuffer(data, dtype=_DTYPES[place.entry.dtype]).reshape(place.entry.shape)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors durably as another file.

        Raises:
            OSError: the file could not be written; the existing files are unchanged.
        """
        plain = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}
        digest = _digest_of(safetensors.torch.save(plain))
        file = self.folder / f"shard-{digest[:16]}.safetensors"
        write_atomically(file, safetensors.torch.save(plain, {_IDENTITY: self.identity, _DIGEST: digest}))
        self._take(file)

    def _take(self, file: Path) -> None:
        try:
            with open_safetensors(file) as opened:
                fault = _fault(opened)
                identity = opened.metadata.get(_IDENTITY)
                start, entries = len(opened.header), opened.entries
        except ValueError as error:
            fault, identity, start, entries = str(error), None, 0, {}
        if fault is not None:
            _logger.warning("%s: damaged (%s); it is removed, and made again", file, fault)
            file.unlink()
        elif identity != self.identity:
            raise ValueError(
                f"{file}: it was made by {identity!r}, not by {self.identity!r}; it does not belong in this folder"
            )
        else:
            self.places |= {key: ShardLocation(file, start + entry.start, entry) for key, entry in entries.items()}


def _fault(opened: OpenFile) -> str | None:
    """Return what is wrong with a valid safetensors file, or None if it is an intact file of a store."""
    if _IDENTITY not in opened.metadata or _DIGEST not in opened.metadata:
        return "it is not from a cache"
    if any(entry.dtype not in _DTYPES for entry in opened.entries.values()):
        return "a tensor is not of floating-point numbers"
    digest = sha256(_names(opened.entries))
    opened.file.seek(len(opened.header))
    while block := opened.file.read(_BLOCK):
        digest.update(block)
    return None if digest.hexdigest() == opened.metadata[_DIGEST] else "its SHA-256 is not the one it was written with"


def _digest_of(data: bytes) -> str:
    """Return the digest of the names, dtypes, shapes and values in these bytes, whatever else the header contains."""
    length = 8 + int.from_bytes(data[:8], "little")
    fields: dict[str, Any] = json.loads(data[8:length])
    fields.pop("__metadata__", None)
    entries = {key: Entry(of["dtype"], tuple(of["shape"]), *of["data_offsets"]) for key, of in fields.items()}
    return sha256(_names(entries) + data[length:]).hexdigest()


def _names(entries: Mapping[str, Entry]) -> bytes:
    facts = {key: [entry.dtype, *entry.shape, entry.start, entry.end] for key, entry in entries.items()}
    return json.dumps(facts, sort_keys=True).encode()
