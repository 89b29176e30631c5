"""The scale of each layer of a LoRA file: what peft's configuration, beside the file or in its header, says of alpha."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loca_vision.checks import is_finite
from loca_vision.storage.strict_json import strict_json

METADATA_KEY = "lora_adapter_metadata"
# With any of these the update is another one than scale * B A, or one of other weights.
_OTHERWISE = (
    *("use_dora", "use_qalora", "fan_in_fan_out", "layer_replication", "target_parameters"),
    *("alora_invocation_tokens", "arrow_config", "velora_config", "monteclora_config", "trainable_token_indices"),
)
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # others, as "pissa", change the base weights as well
_LITERAL = re.compile(r"\^?((?:[\w-]|\\?\.)+)\$?")


@dataclass(frozen=True)
class LoraSettings:
    """What of peft's `LoraConfig` decides about the update.

    Args:
        rank, alpha: of layers that no pattern names.
        ranks, alphas: by the names of layers, or the ends of their names after a dot; the first that fits counts. With a
            `^` before it a name is a whole one.
        stabilised: whether the scale is alpha / sqrt(r), not alpha / r.
        whole: the names of modules trained whole.
    """

    rank: int
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    stabilised: bool
    whole: tuple[str, ...] = ()

    def scale(self, path: str, rank: int) -> float:
        """
        Raises:
            ValueError: the settings say another rank.
        """
        said = _of_first(self.ranks, path, self.rank)
        if said != rank:
            raise ValueError(f"{path} has rank {rank}, where its configuration says {said:g}")
        return _of_first(self.alphas, path, self.alpha) / (math.sqrt(rank) if self.stabilised else rank)


def _of_first(patterns: Mapping[str, float], path: str, default: float) -> float:
    return next((value for name, value in patterns.items() if _fits(name, path)), default)


def _fits(name: str, path: str) -> bool:
    if name.startswith("^"):  # a text encoder's model may have lost the text_model that paths in files have
        return name[1:] in (path, path.removeprefix("text_model."))
    return path == name or path.endswith(f".{name}")


def read_settings(fields: Any) -> LoraSettings:
    """Check peft's fields, as JSON has them.

    Raises:
        ValueError: naming the field and the rule; among others for a pattern that is a regular expression, for none out of
            a file is run here.
    """
    if not isinstance(fields, dict):
        raise ValueError("the configuration of a LoRA is an object")
    kind = fields.get("peft_type") or "LORA"
    if kind != "LORA":
        raise ValueError(f"peft_type={kind!r}: expected an adapter of peft's type LORA")
    for field in _OTHERWISE:
        if fields.get(field):
            raise ValueError(f"{field}={fields[field]!r}: such a LoRA is more than two factors, and is not read here")
    start = fields.get("init_lora_weights")
    if not any(start is allowed for allowed in _STARTS[:3]) and start not in _STARTS[3:]:
        raise ValueError(f"init_lora_weights={start!r}: that start changes the base weights as well, and is not read here")
    whole = fields.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) for name in whole):
        raise ValueError(f"modules_to_save={whole!r}: it is a list of names")
    rank, alpha = fields.get("r", 8), fields.get("lora_alpha", 8)
    ranks, alphas = _patterns(fields, "rank_pattern"), _patterns(fields, "alpha_pattern")
    if type(rank) is not int or rank < 1 or not is_finite(alpha):
        raise ValueError(f"r={rank!r}, lora_alpha={alpha!r}: expected a whole number from 1 up and a finite number")
    return LoraSettings(rank, float(alpha), ranks, alphas, bool(fields.get("use_rslora")), tuple(whole))


def _patterns(fields: dict[str, Any], field: str) -> dict[str, float]:
    patterns = fields.get(field) or {}
    if not isinstance(patterns, dict) or not all(is_finite(value) for value in patterns.values()):
        raise ValueError(f"{field}={patterns!r}: it maps names to finite numbers")
    for name in patterns:
        if len(name) > 500 or not _LITERAL.fullmatch(name):
            raise ValueError(f"{field}: {name!r} is a regular expression, and none out of a file is run; name the layers")
    return {name.removesuffix("$").replace("\\", ""): float(value) for name, value in patterns.items()}


def settings_in_header(metadata: Mapping[str, str]) -> dict[str, LoraSettings]:
    """What diffusers (from 0.33 on) writes into the header: settings by component, or under "" for a model by itself.

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
    return {component: read_settings(of) for component, of in parts.items()}
