"""Checkpoints of a training run: folders `checkpoint-N`, written completely or not at all, with a hash of every file.

A run resumes from these, whereas `checkpoint` is about adapter files. One process writes; any may read.
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
    """Write `folder/checkpoint-STEP`, wait until it is on the disk, and only then delete old checkpoints.

    An existing checkpoint of that step is replaced; at no moment is the folder without a complete checkpoint.

    Args:
        folder: the folder of the run; it is created if it does not exist.
        step: the step, from 0 to 10^18 - 1.
        tensors: dense tensors on any device, with any strides; they are read back with the same bits, contiguous, on the CPU.
        state: values that JSON returns unchanged: strings, integers of up to 4000 digits, finite floats, booleans, None, lists,
            and dicts with strings as keys.
        keep: the number of undamaged checkpoints to keep, the newest by step; None for all. The one just written is always
            kept, and so are damaged ones that are newer than the oldest checkpoint kept.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError, TypeError: an argument is invalid; nothing has been touched.
        OSError: the checkpoint could not be written; existing checkpoints are unchanged.
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
    """Return the newest checkpoint, by step, whose files all match its manifest, or None if there is none.

    Damaged checkpoints are skipped, and a warning is logged that names the checkpoint and its fault.

    Raises:
        OSError: the folder cannot be listed.
    """
    folder = Path(folder)
    seen: list[Path] | None = None
    while seen != (seen := _checkpoints(folder)):  # look again if another process has deleted old ones in the meantime
        for path in seen:
            fault = _fault(path)
            if fault is None:
                return path
            if path.exists():
                _logger.warning("passed over as damaged: %s", fault)
    return None


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, on the CPU, and the state of a checkpoint, after checking the hash of every file.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: something in it is damaged or does not belong there; the message names the file and the fault.
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
    # These are copies, because tensors that share memory cannot be in one file.
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
    """Return the step in a checkpoint's name, also in its temporary name while it is replaced; None for other names."""
    aside = ASIDE.fullmatch(path.name)
    name = _NAME.fullmatch(aside["name"] if aside and aside["kind"] == "old" else path.name)
    return int(name[1]) if name else None


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first; of two with the same step, the one with the regular name is first."""
    try:
        found = [(step, path) for path in folder.iterdir() if (step := _step(path)) is not None]
    except FileNotFoundError:
        return []
    return [path for _, path in sorted(found, key=lambda pair: (-pair[0], len(pair[1].name), pair[1].name))]


def _fault(path: Path) -> str | None:
    """Return what is wrong with a checkpoint in a run's folder, where it must not be a link, or None."""
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
    for path in reversed(old):  # delete the oldest first
        if path != written and not path.is_symlink() and path.is_dir():
            try:
                remove_folder(path)
            except OSError as error:
                _logger.warning("%s: this old checkpoint could not be deleted (%s)", path, error.strerror)
