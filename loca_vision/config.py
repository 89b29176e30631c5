"""What a user chooses about LoCA, checked the moment it is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

PARTS = ("q", "k", "v", "out", "fc1", "fc2")
LOCATION_INITS = ("uniform",)
LOCATION_GRADIENTS = ("central", "forward", "backward")


@dataclass(frozen=True)
class LoCAConfig:
    """The settings of Location-aware Cosine Adaptation (ICLR 2025): W' = W0 + scale * C^T S D.

    Args:
        n_components: non-zero coefficients of each adapted projection, from 1 to p * q; or a mapping from a name pattern
            (`"blocks.0.*"`, as in `fnmatch`, over names like `blocks.0.attn.q`) to such a count, the first match counts.
        scale: alpha. Every atom has Frobenius norm 1, so it means the same at every width.
        targets: which projections, out of q, k, v, out of attention layers and fc1, fc2 of the MLPs.
        location_init: "uniform" draws different cells, every cell as likely as any other.
        location_gradient: "central", "forward" or "backward" difference (the last two are V4 and V5 of Table 5).
        seed: of the first locations. Each projection draws from (seed, its name), so targets do not disturb each other.

    Raises:
        ValueError: naming the field, its value and the rule.
    """

    n_components: int | Mapping[str, int] = 3000
    scale: float = 1.0
    targets: tuple[str, ...] = ("q", "v")
    location_init: Literal["uniform"] = "uniform"
    location_gradient: Literal["central", "forward", "backward"] = "central"
    seed: int = 0

    def __post_init__(self) -> None:
        _check_counts(self.n_components)
        if not _is_finite(self.scale) or self.scale == 0:
            raise ValueError(f"scale={self.scale!r}: alpha is a finite number other than 0")
        _check_targets(self.targets)
        for field, allowed in (("location_init", LOCATION_INITS), ("location_gradient", LOCATION_GRADIENTS)):
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r}: the choices are {', '.join(map(repr, allowed))}")
        if not _is_whole(self.seed) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed!r}: a seed is a whole number from 0 to 2**63 - 1")
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "scale", float(self.scale))
        if isinstance(self.n_components, Mapping):
            object.__setattr__(self, "n_components", dict(self.n_components))

    def components(self, names: list[str]) -> dict[str, int]:
        """The count of every projection named.

        Raises:
            ValueError: a name no pattern matches, or a pattern that decides about no name.
        """
        if not isinstance(self.n_components, Mapping):
            return dict.fromkeys(names, self.n_components)
        deciding = {name: next((p for p in self.n_components if fnmatchcase(name, p)), None) for name in names}
        for name, pattern in deciding.items():
            if pattern is None:
                raise ValueError(f"n_components={self.n_components!r}: no pattern matches {name}")
        for pattern in self.n_components:
            if pattern not in deciding.values():
                raise ValueError(f"n_components: the pattern {pattern!r} decides about no projection, such as {names[0]}")
        return {name: self.n_components[str(pattern)] for name, pattern in deciding.items()}

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values, from which `LoCAConfig(**fields)` makes an equal configuration."""
        return asdict(self) | {"targets": list(self.targets)}


def _check_counts(counts: object) -> None:
    if isinstance(counts, Mapping):
        if not counts:
            raise ValueError("n_components={}: a mapping names at least one pattern")
        for pattern, count in counts.items():
            if not isinstance(pattern, str):
                raise ValueError(f"n_components: the key {pattern!r} is not a name pattern such as 'blocks.0.*'")
            if not _is_whole(count) or count < 1:
                raise ValueError(f"n_components[{pattern!r}]={count!r}: a count is a whole number from 1 up")
    elif not _is_whole(counts) or counts < 1:  # type: ignore[operator]
        raise ValueError(f"n_components={counts!r}: a count is a whole number from 1 up, or a mapping from patterns to counts")


def _check_targets(targets: object) -> None:
    if isinstance(targets, str) or not isinstance(targets, (tuple, list)):
        raise ValueError(f"targets={targets!r}: a tuple of parts is wanted, such as ('q', 'v')")
    if not targets:
        raise ValueError(f"targets=(): name at least one of {', '.join(PARTS)}")
    for part in targets:
        if part not in PARTS:
            raise ValueError(f"targets={tuple(targets)!r}: {part!r} is not one of {', '.join(PARTS)}")
    if len(set(targets)) < len(targets):
        raise ValueError(f"targets={tuple(targets)!r}: a part is named twice")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of floats
        return False
