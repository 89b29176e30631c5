"""The manifest of a training checkpoint: the names, sizes and SHA-256 hashes of its files."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

from loca_vision.storage.strict_json import strict_json

TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"
FORMAT = "loca-vision checkpoint 1"
MAX_MANIFEST, MAX_STATE = 2**16, 2**26  # bytes
_LONGEST, _NESTING = 4000, 32  # the digits of a number, and the nesting of dicts and lists, in the state


def make_manifest(step: int, files: Mapping[str, bytes]) -> bytes:
    """Return the bytes of `manifest.json`; the same facts always result in the same bytes."""
    facts = {name: {"sha256": sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}
    return _canonical({"files": facts, "format": FORMAT, "step": step})


def _canonical(fields: object) -> bytes:
    return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()


def verify(folder: Path, step: int | None) -> None:
    """Compare every file of a checkpoint with its manifest, ignoring names that begin with a dot, such as a file manager's.

    Args:
        folder: the folder of the checkpoint.
        step: the step that the manifest must state; None for any.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: something in it is damaged or does not belong there; the message names the file and the fault.
        OSError: a file cannot be read.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: there is no such checkpoint")
    if not folder.is_dir():
        raise ValueError(f"{folder}: it is not a folder, as a checkpoint is")
    fields = _manifest(folder / MANIFEST)
    if step is not None and fields["step"] != step:
        raise ValueError(f"{folder / MANIFEST}: it is of step {fields['step']}, not of {step}")
    extra = sorted(entry.name for entry in folder.iterdir() if entry.name not in (TENSORS, STATE, MANIFEST))
    extra = [name for name in extra if not name.startswith(".")]
    if extra:
        raise ValueError(f"{folder / repr(extra[0])}: the manifest has no such file")
    for name in (STATE, TENSORS):
        _compare(folder / name, fields["files"][name])


def _manifest(path: Path) -> dict[str, Any]:
    data = read_small(path, MAX_MANIFEST)
    try:
        fields: dict[str, Any] = strict_json(data.decode())
        sound = set(fields) == {"files", "format", "step"} and fields["format"] == FORMAT and type(fields["step"]) is int
        sound = sound and set(fields["files"]) == {TENSORS, STATE} and all(map(_sound, fields["files"].values()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: it is not a manifest ({error})") from None
    if not sound or _canonical(fields) != data:
        raise ValueError(f"{path}: it is not a manifest as this version writes it ({FORMAT!r})")
    return fields


def _sound(facts: Any) -> bool:
    if set(facts) != {"sha256", "size"} or type(facts["size"]) is not int or not isinstance(facts["sha256"], str):
        return False
    return facts["size"] >= 0 and re.fullmatch("[0-9a-f]{64}", facts["sha256"]) is not None


def _compare(path: Path, facts: Mapping[str, Any]) -> None:
    with _opened(path) as file:
        if path.stat().st_size != facts["size"]:
            raise ValueError(f"{path}: it has {path.stat().st_size} bytes, the manifest says {facts['size']}")
        digest = sha256()
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != facts["sha256"]:
        raise ValueError(f"{path}: its SHA-256 is not the one in the manifest")


def parse_state(path: Path, data: bytes | None = None) -> dict[str, Any]:
    """Return the state stored in a file, or in `data`, the bytes that such a file would have.

    Raises:
        ValueError: it is not a valid state; the message begins with the path.
        FileNotFoundError, OSError: as in `read_small`.
    """
    data = read_small(path, MAX_STATE) if data is None else data
    try:
        if len(data) > MAX_STATE:
            raise ValueError(f"it has {len(data)} bytes, of at most {MAX_STATE}")
        state = strict_json(data.decode(), longest=_LONGEST, nesting=_NESTING)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: it is not a table")
    return state


def read_small(path: Path, most: int) -> bytes:
    """Return the content of a regular file of at most `most` bytes.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is a link, not a regular file, or longer.
        OSError: the file cannot be read.
    """
    with _opened(path) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"{path}: it has more than {most} bytes")
    return data


def _opened(path: Path) -> BinaryIO:
    """Open a regular file only, because a link could lead out of the folder and a FIFO would hang."""
    try:
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode):
            raise ValueError(f"{path}: it is {'a link' if stat.S_ISLNK(mode) else 'not a regular file'}")
        return path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: it is missing from the checkpoint") from None
    except OSError as error:
        raise type(error)(f"{path}: it cannot be read ({error.strerror})") from error
