"""The sources an adapter can come from: a file, a folder, a repository on the hub, or tensors in memory."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from loca_vision.formats.adapter_file import FILE_NAME, METADATA_KEY, as_json, described
from loca_vision.formats.hub import hub_file, may_be_a_repository
from loca_vision.formats.opened import InMemory, Opened
from loca_vision.formats.packed.reading import CELLS, TABLE, open_adapter, unpacked
from loca_vision.storage.safetensors_file import may_be_read, pickle_hint

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """Where to look on the hub or in a folder: the arguments of `load_loca_weights`."""

    weight_name: str | None = None
    subfolder: str | None = None
    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool | None = None
    force_download: bool = False


@contextmanager
def opened(source: Any, request: Request) -> Iterator[Opened]:
    """Open the adapter at a source. Errors raised inside the `with` say where the adapter came from.

    Raises:
        TypeError: the source is not a path, name or mapping.
        FileNotFoundError, OSError: it cannot be found or reached.
        ValueError: a name leaves its folder, or the file is unsound.
    """
    if isinstance(source, Mapping):
        try:
            yield unpacked(InMemory.of(source))
        except (ValueError, TypeError) as error:
            raise ValueError(f"state dict: {error}") from None
    elif isinstance(source, (str, os.PathLike)):
        with open_adapter(locate(source, request)) as file:
            yield file
    else:
        raise TypeError(f"source is a {type(source).__name__}: expected a folder, a file, a hub id or a state dict")


def with_description(source: Opened, shapes: Callable[[], Mapping[str, tuple[int, int]]]) -> dict[str, str]:
    """Return the metadata or, for a state dict without any, what its tensors and the pipeline's `shapes` tell."""
    if METADATA_KEY in source.metadata or not isinstance(source, InMemory):
        return source.metadata
    if {TABLE, CELLS} <= source.entries.keys():
        raise ValueError(f"its components are packed, and only {METADATA_KEY!r} says how: load the file itself")
    about = described(source.entries, shapes())
    _LOG.warning("a state dict without %r does not say its scale: 1.0 is taken", METADATA_KEY)
    return {METADATA_KEY: json.dumps(as_json(about))}


# Paths and the hub


def locate(source: str | os.PathLike[str], request: Request) -> Path:
    """Return the path of the adapter's file, fetching it from the hub if the source is the name of a repository."""
    for what, name in (("weight_name", request.weight_name), ("subfolder", request.subfolder)):
        _refuse_escape(what, name)
    if request.weight_name is not None and (len(PurePosixPath(request.weight_name).parts) != 1 or "\\" in request.weight_name):
        raise ValueError(f"weight_name={request.weight_name!r}: expected the name of a file, without a folder; see subfolder")
    text = os.fspath(source)
    if not isinstance(text, str) or not text or "\0" in text:
        raise ValueError(f"source={source!r}: expected a folder, a file or a hub id")
    path = Path(text)
    if path.is_dir():
        return _in_folder(path, request)
    if path.exists():
        if request.weight_name is not None or request.subfolder is not None:
            raise ValueError(f"{text}: it is a file, in which there is no weight_name or subfolder to look for")
        return path
    if not isinstance(source, str) or not may_be_a_repository(text):
        raise FileNotFoundError(f"{text}: there is no such file or folder")
    return hub_file(
        text,
        request.weight_name or FILE_NAME,
        subfolder=request.subfolder,
        revision=request.revision,
        token=request.token,
        cache_dir=None if request.cache_dir is None else str(request.cache_dir),
        force_download=request.force_download,
        local_files_only=bool(request.local_files_only),
    )


def safe_name(name: str | None) -> str:
    """Return the file name of an adapter in a folder, by default `pytorch_loca_weights.safetensors`.

    Raises:
        ValueError: the name contains a folder, or does not end in `.safetensors`.
    """
    if name is None:
        return FILE_NAME
    _refuse_escape("weight_name", name)
    if Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
        raise ValueError(f"weight_name={name!r}: expected the name of a file that ends in .safetensors, without a folder")
    return name


def _refuse_escape(what: str, name: Any) -> None:
    if name is None:
        return
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(f"{what}={name!r}: expected a name")
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if ".." in parts or PurePosixPath(name).is_absolute() or Path(name).is_absolute() or name.startswith("\\") or ":" in name:
        raise ValueError(f"{what}={name!r}: it must stay inside the folder")


def _in_folder(folder: Path, request: Request) -> Path:
    inside = folder / request.subfolder if request.subfolder else folder
    file = inside / (request.weight_name or FILE_NAME)
    if not file.exists():
        there = sorted(p.name for p in inside.iterdir() if p.is_file()) if inside.is_dir() else []
        hint = (f"; there are {', '.join(there[:5])}" if there else "") + pickle_hint(there)
        raise FileNotFoundError(f"{inside}: there is no {file.name} in that folder{hint}")
    if not may_be_read(file, folder):
        raise ValueError(f"{file}: it is a link that leaves the folder")
    return file
