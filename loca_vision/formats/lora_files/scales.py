"""The scale of each layer of a LoRA file, from its alpha or from peft's configuration beside the file or in its header."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from loca_vision.checks import is_finite
from loca_vision.storage.strict_json import strict_json

METADATA_KEY = "lora_adapter_metadata"
# With any of these the update is not scale * B A, or belongs to other weights.
_OTHERWISE = (
    *("use_qalora", "fan_in_fan_out", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config", "trainable_token_indices"),
)
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others, such as "pissa", also change the base weights
_OTHERS = {
    "IA3": "scales the weights",
    "OFT": "rotates the weights",
    "BOFT": "rotates the weights",
    "VERA": "has factors that are not in the file",
    "ADALORA": "has factors of another form",
}
_LITERAL = re.compile(r"\^?((?:[\w-]|\\?\.)+)\$?")


@dataclass(frozen=True)
class PeftSettings:
    """The fields that all configurations of peft have.

    Args:
        whole: the names of modules trained as a whole.
        biases: whether biases were trained too, so that the file contains them whole.
    """

    whole: tuple[str, ...]
    biases: bool

    def is_whole(self, parameter: str) -> bool:
        """Return whether the file has this parameter as a replacement for the model's."""
        return any(f".{name}." in f".{parameter}" for name in self.whole) or (self.biases and parameter.endswith(".bias"))


@dataclass(frozen=True)
class LoraSettings(PeftSettings):
    """The fields of peft's `LoraConfig`, `LoHaConfig` or `LoKrConfig` that determine the update.

    Args:
        rank, alpha: for layers that no pattern names.
        ranks, alphas: by the names of layers, or by the ends of their names after a dot; the first match counts. A name that
            begins with `^` must match the whole name.
        stabilised: whether the scale is alpha / sqrt(r), not alpha / r.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    stabilised: bool

    def scale(self, path: str, rank: int | None) -> float:
        """Return the scale of a layer.

        Args:
            rank: the rank of the layer's factors; None if they do not tell it.

        Raises:
            ValueError: the settings have another rank.
        """
        said = _of_first(self.ranks, path, self.rank)
        if rank is not None and said != rank:
            raise ValueError(f"{path} has rank {rank}, where its configuration says {said:g}")
        return _of_first(self.alphas, path, self.alpha) / (math.sqrt(said) if self.stabilised else said)


@dataclass(frozen=True)
class FourierSettings(PeftSettings):
    """The fields of peft's `FourierFTConfig` that determine the update.

    Args:
        frequencies: number of coefficients of a layer that no pattern names.
        counts: numbers of coefficients by the names of layers, as in `LoraSettings`.
        scaling: the factor of the update.
        seed: the seed of the cells.
    """

    frequencies: int
    counts: Mapping[str, float]
    scaling: float
    seed: int

    def count(self, path: str) -> int:
        """Return the number of coefficients of a layer."""
        return int(_of_first(self.counts, path, self.frequencies))


@dataclass(frozen=True)
class Scales:
    """The sources of the scales of a file's layers.

    Args:
        in_header: settings by component, or under "" for a single model.
        in_folder: peft's configuration beside the file, if any.
    """

    in_header: Mapping[str, LoraSettings]
    in_folder: PeftSettings | None

    def of_layer(self, path: str, in_file: str, alpha: Tensor | None) -> Callable[[int | None], float]:
        """Return a layer's scale as a function of its rank, given its path, its name in the file, and any alpha."""
        if alpha is not None:
            return lambda rank: float(alpha) / rank if rank else 1.0
        component, _, rest = path.partition(".")
        in_header = self.in_header.get(component)
        settings: PeftSettings | None = in_header or self.in_header.get("") or self.in_folder
        if not isinstance(settings, LoraSettings):
            return lambda rank: 1.0
        name = rest if in_header is not None else in_file
        return lambda rank: settings.scale(name, rank)


def _of_first(patterns: Mapping[str, float], path: str, default: float) -> float:
    return next((value for name, value in patterns.items() if _fits(name, path)), default)


def _fits(name: str, path: str) -> bool:
    if name.startswith("^"):  # the text encoder's model may lack the text_model that paths in files have
        return name[1:] in (path, path.removeprefix("text_model."))
    return path == name or path.endswith(f".{name}")


def read_settings(fields: Any) -> PeftSettings:
    """Check peft's fields, as parsed from JSON.

    Raises:
        ValueError: a field is invalid; the error names the field and the rule. Patterns that are regular expressions are
            refused too, because none from a file is run here.
    """
    if not isinstance(fields, dict):
        raise ValueError("the configuration of a LoRA is an object")
    kind = fields.get("peft_type") or "LORA"
    if kind not in ("LORA", "LOHA", "LOKR", "FOURIERFT"):
        why = _OTHERS.get(kind, "is of another kind") if isinstance(kind, str) else "is of another kind"
        raise ValueError(f"peft_type={kind!r}: it {why}; expected LORA, LOHA, LOKR or FOURIERFT")
    for field in _OTHERWISE:
        if fields.get(field):
            raise ValueError(f"{field}={fields[field]!r}: such an update is more than its factors, and is not read here")
    if kind == "LORA":
        _check_start(fields.get("init_lora_weights"))
    whole, bias = fields.get("modules_to_save") or [], fields.get("bias") or "none"
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        raise ValueError(f"modules_to_save={whole!r}: expected a list of names")
    biases = bias != "none"
    return _of_fourier(fields, tuple(whole), biases) if kind == "FOURIERFT" else _of_lora(fields, tuple(whole), biases)


def _check_start(start: Any) -> None:
    if not any(start is allowed for allowed in _STARTS[:3]) and start not in _STARTS[3:]:
        raise ValueError(
            f"init_lora_weights={start!r}: that start changes the base weights as well; save it anew with peft, "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes a plain LoRA of it"
        )


def _of_lora(fields: dict[str, Any], whole: tuple[str, ...], biases: bool) -> LoraSettings:
    rank, alpha = fields.get("r", 8), fields.get("lora_alpha", fields.get("alpha", 8))
    ranks, alphas = _patterns(fields, "rank_pattern"), _patterns(fields, "alpha_pattern")
    if type(rank) is not int or rank < 1 or not is_finite(alpha):
        raise ValueError(f"r={rank!r}, alpha={alpha!r}: expected a whole number from 1 up and a finite number")
    if not all(value >= 1 for value in ranks.values()):
        raise ValueError(f"rank_pattern={ranks!r}: it maps names to ranks from 1 up")
    return LoraSettings(whole, biases, rank, float(alpha), ranks, alphas, bool(fields.get("use_rslora")))


def _of_fourier(fields: dict[str, Any], whole: tuple[str, ...], biases: bool) -> FourierSettings:
    count, scaling, seed = fields.get("n_frequency", 1000), fields.get("scaling", 150.0), fields.get("random_loc_seed", 777)
    if type(count) is not int or count < 1 or not is_finite(scaling) or type(seed) is not int or not 0 <= seed < 2**63:
        raise ValueError(
            f"n_frequency={count!r}, scaling={scaling!r}, random_loc_seed={seed!r}: expected a whole number from 1 up, a "
            "finite number, and a whole number from 0 up"
        )
    return FourierSettings(whole, biases, count, _patterns(fields, "n_frequency_pattern"), float(scaling), seed)


def _patterns(fields: dict[str, Any], field: str) -> dict[str, float]:
    patterns = fields.get(field) or {}
    if not isinstance(patterns, dict) or not all(is_finite(value) for value in patterns.values()):
        raise ValueError(f"{field}={patterns!r}: it maps names to finite numbers")
    for name in patterns:
        if len(name) > 500 or not _LITERAL.fullmatch(name):
            raise ValueError(f"{field}: {name!r} is a regular expression, and none out of a file is run; name the layers")
    return {name.removesuffix("$").replace("\\", ""): float(value) for name, value in patterns.items()}


def settings_in_header(metadata: Mapping[str, str]) -> dict[str, LoraSettings]:
    """Return the settings that diffusers (from 0.33 on) writes into the header: by component, or under "" for a single model.

    Raises:
        ValueError: as `read_settings`.
    """
    if METADATA_KEY not in metadata:
        return {}
    fields = strict_json(metadata[METADATA_KEY])
    if not isinstance(fields, dict):
        raise ValueError(f"{METADATA_KEY}: it is not an object")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in fields.items():
        component, _, field = key.rpartition(".")
        parts.setdefault(component, {})[field] = value
    found = {component: read_settings(of) for component, of in parts.items()}
    return {component: settings for component, settings in found.items() if isinstance(settings, LoraSettings)}
