"""Write LoRA files for diffusers and peft; those with kohya's keys are written in `kohya_writer`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from loca_vision.formats.lora_files.keys import PEFT_PREFIX
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.reader import DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS
from loca_vision.formats.lora_files.scales import METADATA_KEY
from loca_vision.formats.lora_files.written_layers import LoraLayers, check_any, file_to_write
from loca_vision.storage.atomic_folder import check_replaceable, write_folder
from loca_vision.storage.safetensors_file import write_safetensors

_MAGNITUDE = "lora_magnitude_vector"


def write_diffusers_lora(
    path: str | os.PathLike[str],
    pairs: Mapping[str, LowRankPair],
    *,
    kernels: Mapping[str, tuple[int, int]] | None = None,
    magnitudes: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write a LoRA that `pipe.load_lora_weights` takes: `unet.<module>.lora_A.weight`, and the ranks in the header.

    Scales are multiplied into `up`, so alpha is the rank everywhere: diffusers before 0.33, which does not read the header,
    then gets the same update. If that is not exact in half precision, the factor is written in float32.

    Args:
        path: a file that ends in .safetensors, or a folder for `pytorch_lora_weights.safetensors`. An existing one is replaced.
        pairs: the factors by module path, with the component of the pipeline before it: `unet.`, `transformer.`,
            `text_encoder.`, ...
        kernels, magnitudes: as in `LoraLayers`.
        dtype: the dtype of the factors; by default the one they have.

    Returns:
        The file.

    Raises:
        ValueError: there is no pair, a path lacks such a component, only some modules of a component are DoRA, or a factor is
            not finite in that dtype.
        OSError: as `write_atomically`.
    """
    file = file_to_write(path, DIFFUSERS_WEIGHTS)
    layers = LoraLayers(pairs, kernels or {}, magnitudes or {}).with_components()
    tensors: dict[str, Tensor] = {}
    parts: dict[str, dict[str, str]] = {}  # component -> module -> its full name
    for name, pair in layers.pairs.items():
        component, _, module = name.partition(".")
        parts.setdefault(component, {})[module] = name
        tensors |= layers.factors(name, (f"{name}.lora_A.weight", f"{name}.lora_B.weight"), pair.scale, dtype)
        if name in layers.magnitudes:
            tensors[f"{name}.{_MAGNITUDE}"] = layers.magnitude(name)
    header = {f"{part}.{key}": value for part, of in parts.items() for key, value in _config_of(part, of, layers).items()}
    write_safetensors(file, tensors, {"format": "pt", METADATA_KEY: json.dumps(header, indent=2, sort_keys=True)})
    return file


def _config_of(component: str, modules: Mapping[str, str], layers: LoraLayers) -> dict[str, Any]:
    """Return the fields of peft's configuration that diffusers reads from the header.

    Whether a text encoder's paths contain `text_model` depends on the version of transformers; peft matches the end of a name.
    """
    clip = component.startswith("text_encoder")
    ranks = {module: layers.pairs[name].rank for module, name in modules.items()}
    names = {module.removeprefix("text_model.") if clip else module: rank for module, rank in ranks.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {("" if clip else "^") + module: rank for module, rank in names.items() if rank != usual}
    same = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
    dora = _is_dora(modules.values(), layers)
    return same | {"target_modules": sorted(names), "bias": "none", "use_rslora": False, "use_dora": dora}


def write_peft_lora(
    folder: str | os.PathLike[str],
    pairs: Mapping[str, LowRankPair],
    *,
    kernels: Mapping[str, tuple[int, int]] | None = None,
    magnitudes: Mapping[str, Tensor] | None = None,
    whole: Mapping[str, Tensor] | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a LoRA that `PeftModel.from_pretrained(model, folder)` takes.

    Args:
        folder: the folder for `adapter_model.safetensors` and `adapter_config.json`; at the end either both exist or neither.
        pairs: the factors by the path of the model's module: `blocks.0.attn.qkv`.
        kernels, magnitudes: as in `LoraLayers`.
        whole: parameters trained as a whole, by name, such as `head.weight`: all those of their modules.
        base_model: the model that the configuration names, as on the hub: `timm/vit_small_patch16_224.augreg_in21k`.
        overwrite: replace a folder that holds these two files and no others.

    Returns:
        The folder.

    Raises:
        ValueError: there is no pair, only some modules are DoRA, or a factor is not finite.
        FileExistsError, OSError: as `check_replaceable`, `write_folder`.
    """
    check_any(pairs)
    layers = LoraLayers(pairs, kernels or {}, magnitudes or {})
    tensors = {f"{PEFT_PREFIX}{name}": tensor.detach().cpu().clone() for name, tensor in (whole or {}).items()}
    for name in pairs:
        key = f"{PEFT_PREFIX}{name}"
        tensors |= layers.factors(name, (f"{key}.lora_A.weight", f"{key}.lora_B.weight"))
        if name in layers.magnitudes:
            tensors[f"{key}.{_MAGNITUDE}"] = layers.magnitude(name)
    modules = sorted({name.rpartition(".")[0] for name in whole or {}})
    config = _peft_config(layers) | {"modules_to_save": modules or None, "base_model_name_or_path": base_model}
    path = Path(folder)
    weights = safetensors.torch.save(tensors, {"format": "pt"})
    files = {PEFT_WEIGHTS: weights, PEFT_CONFIG: json.dumps(config, indent=2, sort_keys=True).encode()}
    check_replaceable(path, overwrite=overwrite, ours=lambda file: file.name in files)
    write_folder(path, files)
    return path


def _peft_config(layers: LoraLayers) -> dict[str, Any]:
    ranks = {name: pair.rank for name, pair in layers.pairs.items()}
    alphas = {name: pair.scale * pair.rank for name, pair in layers.pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(layers.pairs),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": _is_dora(layers.pairs, layers),
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "task_type": None,
    }


def _is_dora(names: Collection[str], layers: LoraLayers) -> bool:
    """Return whether the modules are DoRA, which peft's configuration says once for all of them.

    Raises:
        ValueError: only some are; peft would give the others a magnitude and thereby change their update.
    """
    without = [name for name in names if name not in layers.magnitudes]
    dora = len(without) < len(names)
    if dora and without:
        raise ValueError(f"{without[0]} is not a DoRA where others are: peft and diffusers know one of both for a whole model")
    return dora
