"""LoRA files for others to read: peft, diffusers, and whatever reads kohya's keys (ComfyUI among them)."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from loca_vision.formats.lora_keys import PEFT_PREFIX, canonical, flattened
from loca_vision.formats.lora_reader import DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS
from loca_vision.formats.lora_scales import METADATA_KEY
from loca_vision.formats.low_rank_pair import LowRankPair
from loca_vision.storage.atomic_folder import check_replaceable, write_folder
from loca_vision.storage.safetensors_file import PICKLES, write_safetensors

_COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")


def write_diffusers_lora(
    path: str | os.PathLike[str], pairs: Mapping[str, LowRankPair], *, dtype: torch.dtype | None = None
) -> Path:
    """Write a LoRA that `pipe.load_lora_weights` takes: `unet.<module>.lora_A.weight`, and the ranks in the header.

    Scales are multiplied into `up`, so that alpha is the rank everywhere: readers that know no header (ComfyUI, diffusers
    before 0.33) have the same update then. Where that is not exact in half precision, that factor is written in float32.

    Args:
        path: a file that ends in .safetensors, or a folder for `pytorch_lora_weights.safetensors`. Replaced if it is there.
        pairs: by module path, with the component of the pipeline before it: `unet.`, `transformer.`, `text_encoder.`, ...
        dtype: of the factors; by default the one they have.

    Returns:
        The file.

    Raises:
        ValueError: no pair, a path without such a component, or a factor that is not finite in that dtype.
        OSError: as `write_atomically`.
    """
    file = _file_to_write(path, DIFFUSERS_WEIGHTS)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    for name, pair in _with_components(pairs).items():
        component, _, module = name.partition(".")
        ranks.setdefault(component, {})[module] = pair.rank
        tensors |= _factors(f"{name}.lora_A.weight", f"{name}.lora_B.weight", pair, pair.scale, dtype)
    header = {f"{part}.{key}": value for part, of in ranks.items() for key, value in _config_of(part, of).items()}
    write_safetensors(file, tensors, {"format": "pt", METADATA_KEY: json.dumps(header, indent=2, sort_keys=True)})
    return file


def _config_of(component: str, ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of peft's configuration that diffusers reads from the header.

    A text encoder has `text_model` in its paths or not, as the version of transformers is: peft takes the end of a name.
    """
    clip = component.startswith("text_encoder")
    names = {module.removeprefix("text_model.") if clip else module: rank for module, rank in ranks.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {("" if clip else "^") + module: rank for module, rank in names.items() if rank != usual}
    same = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
    return same | {"target_modules": sorted(names), "bias": "none", "use_rslora": False, "use_dora": False}


def write_kohya_lora(
    path: str | os.PathLike[str], pairs: Mapping[str, LowRankPair], *, dtype: torch.dtype | None = None
) -> Path:
    """Write a LoRA with kohya's keys: `lora_unet_<module with underscores>.lora_down.weight`, `.lora_up.weight`, `.alpha`.

    ComfyUI, the web UIs and `pipe.load_lora_weights` take it. Two things are for diffusers (0.42), which would lose updates
    without a word: one alpha holds for a whole component, and what is over goes into `up`; and a text encoder with updates
    of other projections only gets one of zeros for an output projection.

    Args:
        path: a file that ends in .safetensors. Replaced if it is there.
        pairs: of `unet`, `text_encoder` and `text_encoder_2` of Stable Diffusion.
        dtype: of the factors; by default the one they have.

    Returns, Raises: as `write_diffusers_lora`.
    """
    file = _file_to_write(path, None)
    named = _with_components(pairs)
    named |= _zeros_for_diffusers(named)
    several = any(name.startswith("text_encoder_2.") for name in named)
    alphas = {component: _alpha(named, component) for component in {name.partition(".")[0] for name in named}}
    tensors: dict[str, Tensor] = {}
    for name, pair in named.items():
        key, alpha = flattened(name, several_encoders=several), alphas[name.partition(".")[0]]
        rest = pair.scale * pair.rank / alpha
        rest = 1.0 if abs(rest - 1) < 1e-9 else rest
        tensors |= _factors(f"{key}.lora_down.weight", f"{key}.lora_up.weight", pair, rest, dtype)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    write_safetensors(file, tensors, {"format": "pt"})
    return file


def _zeros_for_diffusers(pairs: Mapping[str, LowRankPair]) -> dict[str, LowRankPair]:
    """An output projection's update of zeros: by one of those diffusers tells how a text encoder's keys are meant."""
    zeros: dict[str, LowRankPair] = {}
    for component in ("text_encoder", "text_encoder_2"):
        there = [name for name in pairs if name.startswith(f"{component}.") and ".self_attn." in name]
        if there and not any(name.endswith(".out_proj") for name in there):
            down = pairs[there[0]].down  # CLIP's attention is as wide inside as outside
            name = f"{there[0].rpartition('.')[0]}.out_proj"
            zeros[name] = LowRankPair(torch.zeros_like(down[:1]), down.new_zeros(down.shape[1], 1))
    return zeros


def _alpha(pairs: Mapping[str, LowRankPair], component: str) -> float:
    """The alpha most layers of a component have."""
    there = [pair.scale * pair.rank for name, pair in pairs.items() if name.startswith(f"{component}.")]
    return Counter(float(f"{alpha:.6g}") for alpha in there if alpha).most_common(1)[0][0] if any(there) else 1.0


def write_peft_lora(
    folder: str | os.PathLike[str],
    pairs: Mapping[str, LowRankPair],
    *,
    whole: Mapping[str, Tensor] | None = None,
    base_model: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a LoRA that `PeftModel.from_pretrained(model, folder)` takes.

    Args:
        folder: for `adapter_model.safetensors` and `adapter_config.json`; both are there at the end, or neither.
        pairs: by the paths of the model's modules: `blocks.0.attn.qkv`.
        whole: parameters trained as a whole, by name, `head.weight`: all those of their modules.
        base_model: what the configuration says it is for.
        overwrite: replace a folder that holds these two files and no others.

    Returns:
        The folder.

    Raises:
        ValueError: no pair.
        FileExistsError, OSError: as `check_replaceable`, `write_folder`.
    """
    _check_any(pairs)
    tensors = {f"{PEFT_PREFIX}{name}": tensor.detach().cpu().clone() for name, tensor in (whole or {}).items()}
    for name, pair in pairs.items():
        key = f"{PEFT_PREFIX}{name}"
        tensors |= _factors(f"{key}.lora_A.weight", f"{key}.lora_B.weight", pair, 1.0, None)
    modules = sorted({name.rpartition(".")[0] for name in whole or {}})
    config = _peft_config(pairs) | {"modules_to_save": modules or None, "base_model_name_or_path": base_model}
    path = Path(folder)
    weights = safetensors.torch.save(tensors, {"format": "pt"})
    files = {PEFT_WEIGHTS: weights, PEFT_CONFIG: json.dumps(config, indent=2, sort_keys=True).encode()}
    check_replaceable(path, overwrite=overwrite, ours=lambda file: file.name in files)
    write_folder(path, files)
    return path


def _peft_config(pairs: Mapping[str, LowRankPair]) -> dict[str, Any]:
    ranks = {name: pair.rank for name, pair in pairs.items()}
    alphas = {name: pair.scale * pair.rank for name, pair in pairs.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {f"^{name}": value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {f"^{name}": value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(pairs),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "task_type": None,
    }


def _with_components(pairs: Mapping[str, LowRankPair]) -> dict[str, LowRankPair]:
    _check_any(pairs)
    for name in pairs:
        component, _, module = name.partition(".")
        if component not in _COMPONENTS or not module:
            raise ValueError(f"{name}: it begins with no component of a pipeline ({', '.join(_COMPONENTS)})")
    named = {canonical(name): pair for name, pair in pairs.items()}
    if len(named) < len(pairs):
        raise ValueError("a layer of a text encoder comes twice, with and without text_model")
    return named


def _check_any(pairs: Mapping[str, LowRankPair]) -> None:
    if not pairs:
        raise ValueError("there is no update to write")


def _factors(down: str, up: str, pair: LowRankPair, factor: float, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The pair's tensors by these keys, with a factor in `up`."""
    wide = torch.promote_types(pair.up.dtype, torch.float32)
    exact = pair.up.detach().to(wide) * factor
    same = exact.to(pair.up.dtype)
    chosen = same if torch.equal(same.to(wide), exact) else exact
    tensors = {down: pair.down.detach().to(dtype or pair.down.dtype), up: chosen.to(dtype or chosen.dtype)}
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} is not finite in {tensor.dtype}")
    return {key: tensor.cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


def _file_to_write(path: str | os.PathLike[str], name: str | None) -> Path:
    file = Path(path)
    if file.suffix == ".safetensors" and not file.is_dir():
        return file
    if name is None or file.suffix in PICKLES:
        raise ValueError(f"path={str(path)!r}: a LoRA is written to a file that ends in .safetensors")
    return file / name
