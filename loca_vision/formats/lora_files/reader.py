"""Read files of LoRA and related methods by peft, diffusers, kohya, LyCORIS and others, as updates by module path."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loca_vision.formats.adapter_file import FLOATS
from loca_vision.formats.lora_files.keys import PEFT_PREFIX, family_of, parse_key
from loca_vision.formats.lora_files.layer_tensors import FileLayer, LoraFile, add_layer
from loca_vision.formats.lora_files.roles import role_of
from loca_vision.formats.lora_files.scales import PeftSettings, Scales, read_settings, settings_in_header
from loca_vision.storage.safetensors_file import (
    EIGHT_BITS,
    Entry,
    in_sixteen_bits,
    open_safetensors,
    pickle_hint,
    refuse_pickle,
)
from loca_vision.storage.strict_json import read_json

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass
class _Sorted:
    """The keys of a file, sorted by their purpose."""

    layers: dict[str, dict[str, str]] = field(default_factory=dict)  # path -> role -> key
    named: dict[str, FileLayer] = field(default_factory=dict)  # path -> its name in the file, and its modules in the model
    whole: dict[str, str] = field(default_factory=dict)  # parameter -> key
    foreign: dict[str, tuple[str, str]] = field(default_factory=dict)  # key -> its layer's path and what it is


def read_lora(
    path: str | os.PathLike[str], *, skip: bool = False, sizes: Mapping[str, tuple[int, int]] | None = None
) -> LoraFile:
    """Read a LoRA, LoCon, LoHa, LoKr or full difference: a file, or the folder that peft or diffusers wrote it to.

    Keys are understood as written by peft (with `adapter_config.json` beside the file), by diffusers, now and formerly, and by
    kohya, LyCORIS, ComfyUI, XLabs and OneTrainer, with the names of diffusers or of the original models.
    A layer's scale is its `.alpha` over its rank, or else what the header or `adapter_config.json` says, or else 1.

    Args:
        skip: leave out layers whose update is of another kind (OFT, IA3, ...) and keys that are not part of any update, and
            list them in the result. Otherwise the first of them is refused.
        sizes: (p, q) of the model's weights by module, which peft's FourierFT needs.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not sound or not understood: half of a pair is missing, shapes do not fit, a tensor holds NaN or
            infinity, a layer occurs twice, a key is unknown, or there is no configuration. The error is one sentence with the
            file's path and the key.
    """
    file = _file(Path(path))
    with open_safetensors(file, eight_bits=True) as opened:
        settings = _settings_in_folder(file, opened.entries)
        found = _sort(opened.entries, settings)
        scales = Scales(settings_in_header(opened.metadata), settings)
        skipped = _skipped(found, skip=skip)
        layers = {name: keys for name, keys in found.layers.items() if not skipped.keys() & set(keys.values())}
        if not layers:
            raise ValueError("there is no update of a matrix in it")
        _check_dtypes(opened.entries, layers)
        tensors = {key: in_sixteen_bits(tensor) for key, tensor in opened.tensors().items() if key not in skipped}
        _check_values(tensors)
        read = LoraFile({}, {name: tensors[key] for name, key in found.whole.items()}, skipped=skipped)
        for name, keys in layers.items():
            parts = {role: tensors[key] for role, key in keys.items()}
            try:
                add_layer(read, found.named[name], parts, scales, sizes or {})
            except ValueError as error:
                raise ValueError(f"{next(iter(keys.values()))}: {error}") from None
    return read


def has_lora(path: Path) -> bool:
    """Return whether a folder has a LoRA under one of its usual names."""
    return path.is_dir() and any((path / name).exists() for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS))


def _file(path: Path) -> Path:
    if not path.is_dir():
        refuse_pickle(path)
        return path
    for name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS):
        if (path / name).exists():
            return path / name
    there = sorted(file for file in path.iterdir() if file.suffix == ".safetensors")
    if len(there) == 1:
        return there[0]
    hint = pickle_hint(file.name for file in path.iterdir())
    several = (
        f"several safetensors files are in that folder, as {there[0].name}: name one" if there else f"no LoRA is in it{hint}"
    )
    raise FileNotFoundError(f"{path}: {several}")


def _settings_in_folder(file: Path, keys: Collection[str]) -> PeftSettings | None:
    """Return the configuration beside a file that peft wrote; None for other files."""
    if file.name != PEFT_WEIGHTS and not any(key.startswith(PEFT_PREFIX) for key in keys):
        return None
    if not file.with_name(PEFT_CONFIG).exists():
        raise ValueError(f"it is of peft, which keeps alpha in {PEFT_CONFIG}: that file is missing from the folder")
    return read_settings(read_json(file.with_name(PEFT_CONFIG)))


def _sort(entries: Mapping[str, Entry], settings: PeftSettings | None) -> _Sorted:
    found, family = _Sorted(), family_of(entries)
    for key in entries:
        part = parse_key(key, family)
        parameter = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".")  # the module that peft's layers wrap
        if part.role == "foreign" and settings is not None and settings.is_whole(parameter):
            found.whole[parameter] = key
        elif part.role == "foreign":
            found.foreign[key] = part.path, part.what
        elif part.role in found.layers.setdefault(part.path, {}):
            raise ValueError(f"{key}: {part.path} has that part twice, in {found.layers[part.path][part.role]} as well")
        else:
            found.layers[part.path][part.role] = key
            found.named[part.path] = FileLayer(part.path, role_of(parameter)[0], part.layer)
    return found


def _skipped(found: _Sorted, *, skip: bool) -> dict[str, str]:
    """Return the keys to leave out: the foreign ones, and the others of their layers, which are meaningless without them."""
    for key, (_, what) in found.foreign.items():
        if not skip:
            raise ValueError(
                f"{key}: {what}; only updates that are added to a weight are read, and nothing left out unless that is asked "
                "for (skip)"
            )
    skipped = {key: what for key, (_, what) in found.foreign.items()}
    for path, what in found.foreign.values():
        skipped |= {key: what for key in found.layers.get(path, {}).values() if key not in skipped}
    return skipped


def _check_dtypes(entries: Mapping[str, Entry], layers: Mapping[str, Mapping[str, str]]) -> None:
    for keys in layers.values():
        for role, key in keys.items():
            if role != "alpha" and entries[key].dtype not in (*FLOATS, *EIGHT_BITS):
                raise ValueError(f"{key} has dtype {entries[key].dtype}: expected one of {', '.join((*FLOATS, *EIGHT_BITS))}")
            if role == "alpha" and any(size != 1 for size in entries[key].shape):
                raise ValueError(f"{key} has shape {entries[key].shape}: expected one number")


def _check_values(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds NaN or infinity")
