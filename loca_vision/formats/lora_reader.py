"""LoRA files of peft, diffusers and kohya, read as one: updates of low rank by the paths of their modules."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from loca_vision.formats.adapter_file import FLOATS
from loca_vision.formats.lora_keys import PEFT_PREFIX, parse_key
from loca_vision.formats.lora_scales import LoraSettings, read_settings, settings_in_header
from loca_vision.formats.low_rank_pair import LowRankPair
from loca_vision.storage.safetensors_file import Entry, open_safetensors, pickle_hint, refuse_pickle
from loca_vision.storage.strict_json import read_json

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class LoraFile:
    """What is in a LoRA file.

    Args:
        pairs: the updates by module path, in the file's order; of a pipeline's, the paths begin with the component:
            `unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q`. A text encoder's have `text_model` in them.
        whole: tensors trained as a whole (`modules_to_save` of peft), by the parameter's name.
        skipped: the keys left out, with what they are.
        kernels: (kh, kw) of the layers whose factors are convolutions.
    """

    pairs: dict[str, LowRankPair]
    whole: dict[str, Tensor] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    kernels: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass
class _Sorted:
    """Keys of a file by what they are for."""

    layers: dict[str, dict[str, str]] = field(default_factory=dict)  # path -> role -> key
    whole: dict[str, str] = field(default_factory=dict)  # parameter -> key
    foreign: dict[str, tuple[str, str]] = field(default_factory=dict)  # key -> its layer's path and what it is


def read_lora(path: str | os.PathLike[str], *, skip: bool = False) -> LoraFile:
    """Read a LoRA: a file, or the folder that peft or diffusers wrote it to.

    Keys are understood as peft writes them (with `adapter_config.json` beside), as diffusers does, now and formerly, and as
    kohya does, with the names of diffusers' or of the original UNet. Convolutions of 1 x 1 count as matrices.
    A layer's scale is its `.alpha` by its rank, or else what the header or `adapter_config.json` says, or else 1.

    Args:
        skip: leave out the layers that are no LoRA of a matrix (LoHa, LoKr, DoRA, larger convolutions, ...), and keys that
            are no part of any, and list them in the result. Without, the first of them is refused.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the file is not sound, or not understood, in one sentence with its path and the key: half of a pair is
            missing, shapes do not fit, NaN or infinity, a layer that comes twice, an unknown key, no configuration.
    """
    file = _file(Path(path))
    with open_safetensors(file) as opened:
        settings = _settings_in_folder(file, opened.entries)
        found = _sort(opened.entries, settings)
        in_header = settings_in_header(opened.metadata)
        _check_complete(found, opened.entries)
        skipped = _skipped(found, skip=skip)
        layers = {name: keys for name, keys in found.layers.items() if not skipped.keys() & set(keys.values())}
        if not layers:
            raise ValueError("there is no LoRA of a matrix in it")
        tensors = opened.tensors()
        _check_values(tensors, [key for keys in (*layers.values(), found.whole) for key in keys.values()])
        pairs = {name: _pair(name, keys, tensors, in_header, settings) for name, keys in layers.items()}
    kernels = {name: (1, 1) for name, keys in layers.items() if tensors[keys["down"]].dim() == 4}
    return LoraFile(pairs, {name: tensors[key] for name, key in found.whole.items()}, skipped, kernels)


def has_lora(path: Path) -> bool:
    """Whether a folder has a LoRA under one of its usual names."""
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


def _settings_in_folder(file: Path, keys: Collection[str]) -> LoraSettings | None:
    """Of a file that peft wrote, what its configuration says."""
    if file.name != PEFT_WEIGHTS and not any(key.startswith(PEFT_PREFIX) for key in keys):
        return None
    if not file.with_name(PEFT_CONFIG).exists():
        raise ValueError(f"it is of peft, which keeps alpha in {PEFT_CONFIG}: that file is missing from the folder")
    return read_settings(read_json(file.with_name(PEFT_CONFIG)))


def _sort(entries: Mapping[str, Entry], settings: LoraSettings | None) -> _Sorted:
    found = _Sorted()
    whole = settings.whole if settings else ()
    for key in entries:
        part = parse_key(key)
        parameter = key.removeprefix(PEFT_PREFIX)
        if part.role == "foreign" and any(f".{name}." in f".{parameter}" for name in whole):
            found.whole[parameter] = key
        elif part.role == "foreign":
            found.foreign[key] = part.path, part.what
        elif part.role in found.layers.setdefault(part.path, {}):
            raise ValueError(f"{key}: {part.path} has that part twice, in {found.layers[part.path][part.role]} as well")
        else:
            found.layers[part.path][part.role] = key
    return found


def _check_complete(found: _Sorted, entries: Mapping[str, Entry]) -> None:
    """Both halves, of fitting shapes, where the layer is a LoRA at all; convolutions larger than 1 x 1 turn foreign."""
    foreign = {path for path, _ in found.foreign.values()}
    for path, keys in found.layers.items():
        if path in foreign:
            continue
        for role, other in (("down", "up"), ("up", "down")):
            if role not in keys:
                raise ValueError(f"{keys.get(other, keys.get('alpha'))}: the {role} half of {path} is missing")
        kernel = next(
            (entries[keys[r]].shape[2:] for r in ("down", "up") if entries[keys[r]].shape[2:] not in ((), (1, 1))), None
        )
        if kernel is not None:
            size = " x ".join(map(str, kernel))
            found.foreign[keys["down"]] = path, f"a convolution of {size}, which is no matrix"
        else:
            _check_pair(keys, entries)


def _check_pair(keys: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
    down, up = entries[keys["down"]], entries[keys["up"]]
    for key, entry in ((keys["down"], down), (keys["up"], up)):
        if entry.dtype not in FLOATS:
            raise ValueError(f"{key} has dtype {entry.dtype}: it is one of {', '.join(FLOATS)}")
    fits = len(down.shape) == len(up.shape) in (2, 4) and down.shape[0] == up.shape[1] and 0 not in down.shape + up.shape
    if not fits:
        raise ValueError(f"{keys['down']} is {down.shape} and {keys['up']} {up.shape}: expected (r, q) and (p, r)")
    alpha = entries[keys["alpha"]].shape if "alpha" in keys else ()
    if any(size != 1 for size in alpha):
        raise ValueError(f"{keys['alpha']} has shape {alpha}: expected one number")


def _skipped(found: _Sorted, *, skip: bool) -> dict[str, str]:
    """The keys to leave out: the foreign ones, and the others of their layers, which mean nothing without."""
    for key, (_, what) in found.foreign.items():
        if not skip:
            raise ValueError(
                f"{key}: {what}; only LoRA of matrices is read, and nothing left out unless that is asked for (skip)"
            )
    skipped = {key: what for key, (_, what) in found.foreign.items()}
    for path, what in found.foreign.values():
        skipped |= {key: what for key in found.layers.get(path, {}).values() if key not in skipped}
    return skipped


def _check_values(tensors: Mapping[str, Tensor], keys: list[str]) -> None:
    for key in keys:
        if not torch.isfinite(tensors[key]).all():
            raise ValueError(f"{key} holds NaN or infinity")


def _pair(
    path: str,
    keys: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    in_header: Mapping[str, LoraSettings],
    in_folder: LoraSettings | None,
) -> LowRankPair:
    down, up = (tensors[keys[role]].flatten(1) for role in ("down", "up"))
    if "alpha" in keys:
        return LowRankPair(down, up, float(tensors[keys["alpha"]]) / len(down))
    component, _, rest = path.partition(".")
    if component in in_header:
        return LowRankPair(down, up, in_header[component].scale(rest, len(down)))
    settings = in_header.get("", in_folder)
    return LowRankPair(down, up, settings.scale(path, len(down)) if settings else 1.0)
