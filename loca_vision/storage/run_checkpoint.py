"""Checkpoints of a training run: folders `checkpoint-N`, written whole or not at all, with a hash of every file.

What a run goes on from, as against `checkpoint`, which is about adapter files. One process writes; any may read.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from loca_vision.storage.atomic_folder import ASIDE, put_back, remove_folder, sweep, write_folder
from loca_vision.storage.run_manifest import MANIFEST, STATE, TENSORS, make_manifest, parse_state, verify
from loca_vision.storage.safetensors_file import MAX_AXES, open_safetensors
from loca_vision.storage.strict_json import MAX_HEADER

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_WHOLE = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}

_logger = logging.getLogger(__name__)


def write_checkpoint(
    folder: str | Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int | None = None
) -> Path:
    """Write `folder/checkpoint-STEP`, wait until it lies on the disk, and only then delete what is too old.

    A checkpoint of that step that is there already is replaced; at no moment is the folder without a whole one.

    Args:
        folder: of the run; made where it is missing.
        step: from 0 to 10^18 - 1.
        tensors: of any device and layout; read back with the same bits, contiguous, on the CPU.
        state: what JSON can give back unchanged: texts, whole numbers of up to 4000 digits, finite floats, truths, None, lists,
            and tables with texts for keys.
        keep: how many whole checkpoints, the newest by step, stay; None for all. The one just written always stays, and so do
            damaged ones that are newer than the oldest of them.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError, TypeError: a wrong argument; nothing is touched.
        OSError: it could not be written; the checkpoints that were there are as they were.
    """
    folder = Path(folder)
    _check_numbers(step, keep)
    data = {TENSORS: _tensor_bytes(tensors), STATE: _state_bytes(state)}
    data[MANIFEST] = make_manifest(step, data)
    path = folder / f"checkpoint-{step}"
    put_back(folder, _NAME)
    write_folder(path, data)
    sweep(folder, _NAME)
    if keep is not None:
        _rotate(folder, path, keep)
    return path


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint, by step, all of whose files match its manifest; None if there is no checkpoint.

    One that is damaged is passed over, with a warning in the log that names it and its fault.

    Raises:
        OSError: the folder cannot be listed.
    """
    folder = Path(folder)
    seen: list[Path] | None = None
    while seen != (seen := _checkpoints(folder)):  # once more, if another process has rotated meanwhile
        for path in seen:
            fault = _fault(path)
            if fault is None:
                return path
            if path.exists():
                _logger.warning("passed over as damaged: %s", fault)
    return None


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the state of a checkpoint, after every file is compared with its hash.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: something in it is damaged or does not belong there; the sentence names the file and the fault.
        OSError: a file cannot be read.
    """
    path = Path(path)
    verify(path, _step(path))
    state = parse_state(path / STATE)
    with open_safetensors(path / TENSORS) as file:
        return file.tensors(), state


def _check_numbers(step: object, keep: object) -> None:
    if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**18:
        raise ValueError(f"step={step!r}: expected a whole number from 0 up, below 10^18")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep={keep!r}: expected a whole number from 1 up, or None for all")


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"{name!r}: a tensor's name is a text other than __metadata__")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise TypeError(f"{name!r}: it is {type(tensor).__name__}, not a dense tensor")
        if tensor.dtype not in _FLOATS | _WHOLE or tensor.dim() > MAX_AXES:
            raise ValueError(f"{name!r}: {tensor.dtype} with {tensor.dim()} axes cannot be in a checkpoint")
    # Copies, since tensors that share memory cannot be in one file.
    plain = {name: t.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in tensors.items()}
    data: bytes = safetensors.torch.save(plain)
    if int.from_bytes(data[:8], "little") > MAX_HEADER:
        raise ValueError(f"tensors: {len(plain)} names and shapes are more than the {MAX_HEADER} bytes that can be read back")
    return data


def _state_bytes(state: Mapping[str, Any]) -> bytes:
    try:
        data = json.dumps(state, allow_nan=False).encode()
        same = parse_state(Path("state"), data) == state
    except (ValueError, TypeError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"state: it cannot be kept as JSON ({error})") from error
    if not same:
        raise ValueError("state: it would come back changed; JSON has lists, no tuples, and texts alone for keys")
    return data


def _step(path: Path) -> int | None:
    """The step in a checkpoint's name, also of one that stands aside while it is replaced; None of another name."""
    aside = ASIDE.fullmatch(path.name)
    name = _NAME.fullmatch(aside["name"] if aside and aside["kind"] == "old" else path.name)
    return int(name[1]) if name else None


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first; of two of a step, the one that has its name."""
    try:
        found = [(step, path) for path in folder.iterdir() if (step := _step(path)) is not None]
    except FileNotFoundError:
        return []
    return [path for _, path in sorted(found, key=lambda pair: (-pair[0], len(pair[1].name), pair[1].name))]


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint in a run's folder, where it may not be a link to another place."""
    try:
        if path.is_symlink():
            return f"{path}: it is a link"
        verify(path, _step(path))
    except (ValueError, OSError) as error:
        return str(error)
    return None


def _rotate(folder: Path, written: Path, keep: int) -> None:
    kept, old = 0, []
    for path in _checkpoints(folder):
        if kept == keep:
            old.append(path)
        elif path == written or _fault(path) is None:
            kept += 1
    for path in reversed(old):  # the oldest goes first
        if path != written and not path.is_symlink() and path.is_dir():
            try:
                remove_folder(path)
            except OSError as error:
                _logger.warning("%s: this old checkpoint could not be deleted (%s)", path, error.strerror)
