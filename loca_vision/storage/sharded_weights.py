"""Read and write full checkpoints, in one safetensors file or in shards with an index, one tensor at a time."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from loca_vision.storage.atomic_file import Content, write_atomically
from loca_vision.storage.atomic_folder import check_replaceable, put_back, sweep, write_folder
from loca_vision.storage.safetensors_file import (
    PICKLES,
    Entry,
    OpenFile,
    may_be_read,
    open_safetensors,
    pickle_hint,
    refuse_pickle,
)
from loca_vision.storage.strict_json import read_json
from loca_vision.version import __version__

INDEX_SUFFIX = ".safetensors.index.json"
_MARK = "loca_vision"  # marks the header of files written here


@dataclass(frozen=True)
class Weights:
    """A checkpoint that is open for reading.

    Args:
        entries: dtype and shape of each tensor by name, in the order of the files.
        files: the checked file that holds each tensor, by the tensor's name.
    """

    entries: Mapping[str, Entry]
    files: Mapping[str, OpenFile]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor now, into its own memory.

        Raises:
            KeyError: there is no tensor with that name.
            ValueError: its file has become shorter.
        """
        return self.files[name].tensor(name)


@contextmanager
def open_weights(path: str | os.PathLike[str]) -> Iterator[Weights]:
    """Open a checkpoint: a safetensors file, an index of shards, or a folder that contains one of these.

    Before the first tensor is read, every header is checked, and the shards are checked against the index: no file name leads
    out of the folder, each tensor is in the shard that the index states, and none is in two shards or missing from the index.

    Raises:
        FileNotFoundError: the checkpoint does not exist.
        ValueError: the checkpoint is a pickle, invalid or incomplete; the message is one sentence that begins with the path.
    """
    file = _file(Path(path))
    with ExitStack() as stack:
        if file.name.endswith(".json"):
            shards = _shards(file)
            opened = {name: stack.enter_context(open_safetensors(file.with_name(name), eight_bits=True)) for name in shards}
            files = _checked(file, shards, opened)
        else:
            alone = stack.enter_context(open_safetensors(file, eight_bits=True))
            files = dict.fromkeys(alone.entries, alone)
        yield Weights({name: of.entries[name] for name, of in files.items()}, files)


def _file(path: Path) -> Path:
    if not path.is_dir():
        refuse_pickle(path)
        return path
    for ending in (INDEX_SUFFIX, ".safetensors"):
        there = sorted(file for file in path.iterdir() if file.name.endswith(ending))
        if len(there) == 1:
            return there[0]
        if there:
            raise ValueError(f"{path}: there are {', '.join(file.name for file in there[:5])} in that folder; name one of them")
    hint = pickle_hint(file.name for file in path.iterdir())
    raise FileNotFoundError(f"{path}: there are no safetensors weights in that folder{hint}")


def _shards(index: Path) -> dict[str, list[str]]:
    """Return the tensors that each shard holds according to the index."""
    table = read_json(index)
    places = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index}: it has no weight_map from tensors to files")
    shards: dict[str, list[str]] = {}
    for tensor, name in places.items():
        shards.setdefault(name, []).append(tensor)
    for name in shards:
        plain = Path(name).name == name and "\\" not in name and "\0" not in name and name.endswith(".safetensors")
        if not plain:
            raise ValueError(f"{index}: {name!r} is not the name of a safetensors file next to it")
        if not may_be_read(index.with_name(name), index.parent):
            raise ValueError(f"{index}: {name} is a link that leaves the folder")
    return shards


def _checked(index: Path, shards: Mapping[str, list[str]], opened: Mapping[str, OpenFile]) -> dict[str, OpenFile]:
    for name, wanted in shards.items():
        there = opened[name].entries
        for tensor in wanted:
            if tensor not in there:
                raise ValueError(f"{index}: {name} has no tensor {tensor!r}, which the index says")
        for tensor in there.keys() - set(wanted):
            raise ValueError(f"{index}: {name} has a tensor {tensor!r} that the index does not say")
    return {tensor: opened[name] for name, wanted in shards.items() for tensor in wanted}


# Writing


def write_weights_files(
    path: str | os.PathLike[str],
    entries: Mapping[str, Entry],
    tensor: Callable[[str], Tensor],
    *,
    stem: str = "model",
    shard_size: int = 5 * 10**9,
    extra: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint completely or not at all, requesting each tensor only when it is its turn.

    Args:
        path: a file that ends in .safetensors, of any size; or a folder, which gets `<stem>.safetensors` or, if that would be
            larger than a shard, `<stem>-00001-of-0000n.safetensors` and `<stem>.safetensors.index.json`.
        entries: dtype and shape of each tensor by name; the absolute values of `start` and `end` do not matter.
        tensor: returns the tensor with a name, in that dtype and shape.
        stem: the first part of the file names in a folder.
        shard_size: the maximal number of bytes of tensors in a shard; a larger tensor gets a shard of its own.
        extra: the content of other files in the folder by name, such as `config.json`.
        overwrite: whether to replace an existing file, or a folder that contains only weights written here and files named in
            `extra`.

    Returns:
        The file, or the folder.

    Raises:
        FileExistsError: something exists there that must not be replaced.
        ValueError: there is no tensor, the shard size is below 1, or a tensor is not as its entry says; in these cases, nothing
            is written.
        OSError: as in `write_atomically`.
    """
    target = Path(path)
    if not entries:
        raise ValueError("there is no tensor to write")
    if shard_size < 1:
        raise ValueError(f"shard_size={shard_size!r}: expected a number of bytes from 1 up")
    if target.suffix == ".safetensors" and not target.is_dir():
        if extra:
            raise ValueError(f"{target}: a single file has no room for {', '.join(extra)}")
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target}: it is there; choose another name, or say that it may be overwritten")
        write_atomically(target, _content(entries, list(entries), tensor))
        return target
    if target.suffix in PICKLES:
        raise ValueError(f"{target}: weights are written to a safetensors file, or to a folder")
    own = re.compile(re.escape(target.name))
    put_back(target.parent, own)
    check_replaceable(target, overwrite=overwrite, ours=lambda file: _is_ours(file, extra or {}))
    write_folder(target, _files(entries, tensor, stem, shard_size) | dict(extra or {}))
    sweep(target.parent, own)
    return target


def _is_ours(file: Path, extra: Mapping[str, bytes]) -> bool:
    """Whether a file in the folder to be replaced was written here, or will be written again."""
    if file.name in extra or file.name.endswith(INDEX_SUFFIX):
        return True
    try:
        with open_safetensors(file, eight_bits=True) as opened:
            return _MARK in opened.metadata
    except ValueError:
        return False


def _files(entries: Mapping[str, Entry], tensor: Callable[[str], Tensor], stem: str, shard_size: int) -> dict[str, Content]:
    """Return the files of a folder by name; their content is produced lazily."""
    shards = _divided(entries, shard_size)
    if len(shards) == 1:
        return {f"{stem}.safetensors": _content(entries, shards[0], tensor)}
    named = {f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors": names for number, names in enumerate(shards, 1)}
    places = {name: file for file, names in named.items() for name in names}
    index = {"metadata": {"total_size": sum(map(_size, entries.values()))}, "weight_map": places}
    files: dict[str, Content] = {file: _content(entries, names, tensor) for file, names in named.items()}
    return files | {f"{stem}{INDEX_SUFFIX}": json.dumps(index, indent=2).encode()}


def _divided(entries: Mapping[str, Entry], shard_size: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = -1
    for name, entry in entries.items():
        if _size(entry) > room or not shards:
            shards.append([])
            room = shard_size
        shards[-1].append(name)
        room -= _size(entry)
    return shards


def _size(entry: Entry) -> int:
    return entry.end - entry.start


def _content(entries: Mapping[str, Entry], names: list[str], tensor: Callable[[str], Tensor]) -> Iterator[bytes | memoryview]:
    """Yield a safetensors file piece by piece: the header, then each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", _MARK: __version__}}
    end = 0
    # The widest dtypes come first, as the library writes them, so that mapped numbers lie at multiples of their own size.
    ordered = sorted(names, key=lambda name: -_item(entries[name]))
    for name in ordered:
        entry = entries[name]
        header[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [end, end + _size(entry)]}
        end += _size(entry)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in ordered:
        yield _data(name, tensor(name), entries[name])


def _item(entry: Entry) -> int:
    """Return the number of bytes of one element; 0 for an empty tensor."""
    return _size(entry) // max(1, math.prod(entry.shape))


def _data(name: str, tensor: Tensor, entry: Entry) -> memoryview:
    file = safetensors.torch.save({"tensor": tensor.detach().to("cpu", memory_format=torch.contiguous_format)})
    start = 8 + int.from_bytes(file[:8], "little")
    about = json.loads(file[8:start])["tensor"]
    if about["dtype"] != entry.dtype or tuple(about["shape"]) != entry.shape:
        raise ValueError(f"{name}: expected {entry.dtype} {entry.shape}, got {about['dtype']} {tuple(about['shape'])}")
    return memoryview(file)[start:]
