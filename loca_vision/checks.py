"""Check what a user chooses as soon as it is chosen, by the rules that all kinds of adapters share."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from torch import Tensor

PARTS = ("q", "k", "v", "out", "fc1", "fc2", "proj_in", "proj_out", "linear")
_MOST_PATTERNS = 1000


def check_targets(targets: object) -> None:
    """Raise ValueError unless these are distinct parts of a model."""
    if isinstance(targets, str) or not isinstance(targets, (tuple, list)):
        raise ValueError(f"targets={targets!r}: expected a tuple of parts, such as ('q', 'v')")
    if not targets:
        raise ValueError(f"targets=(): name at least one of {', '.join(PARTS)}")
    for part in targets:
        if part not in PARTS:
            raise ValueError(f"targets={tuple(targets)!r}: {part!r} is not one of {', '.join(PARTS)}")
    if len(set(targets)) < len(targets):
        raise ValueError(f"targets={tuple(targets)!r}: a part is named twice")


def check_layers(layers: object) -> tuple[str, ...] | None:
    """Return the patterns as a tuple, or None for all layers.

    Raises:
        ValueError: `layers` is not None, a pattern or a list of distinct patterns.
    """
    if layers is None:
        return None
    patterns = (layers,) if isinstance(layers, str) else layers
    if isinstance(patterns, (tuple, list)) and len(patterns) > _MOST_PATTERNS:
        raise ValueError(f"layers: {len(patterns)} name patterns, of at most {_MOST_PATTERNS}")
    if not isinstance(patterns, (tuple, list)) or not patterns:
        raise ValueError(f"layers={layers!r}: expected a name pattern such as '*attn2*', or a list of them")
    for pattern in patterns:
        if not isinstance(pattern, str) or not pattern.removeprefix("!") or len(pattern) > 500:
            raise ValueError(f"layers: expected a name pattern such as '*attn2*', or '!mid_block' to exclude, got {pattern!r}")
    if len(set(patterns)) < len(patterns):
        raise ValueError(f"layers={layers!r}: a pattern comes twice")
    return tuple(patterns)


def check_factor(field: str, value: object) -> None:
    """Raise ValueError unless the value is a finite number other than 0."""
    if not is_finite(value) or value == 0:
        raise ValueError(f"{field}={value!r}: expected a finite number other than 0")


def check_seed(seed: object) -> None:
    if not is_whole(seed) or not 0 <= seed < 2**63:  # type: ignore[operator]
        raise ValueError(f"seed={seed!r}: expected a whole number from 0 to 2**63 - 1")


def check_count(field: str, value: object, least: int = 1, most: int | None = None) -> None:
    if not is_whole(value) or value < least or (most is not None and value > most):  # type: ignore[operator]
        raise ValueError(f"{field}={value!r}: expected a whole number from {least} {'up' if most is None else f'to {most}'}")


def check_share(field: str, value: object, *, open_end: bool = False) -> None:
    """Raise ValueError unless the value is a number from 0 to 1, excluding 1 itself with `open_end`."""
    if not is_finite(value) or not 0 <= value <= 1 or (open_end and value == 1):  # type: ignore[operator]
        raise ValueError(f"{field}={value!r}: expected a number from 0 to 1{', 1 not included' if open_end else ''}")


def check_flag(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{field}={value!r}: expected True or False")


def check_choice(field: str, value: object, choices: Collection[object]) -> None:
    if not any(value is choice or (value == choice and type(value) is type(choice)) for choice in choices):
        raise ValueError(f"{field}={value!r}: the choices are {', '.join(map(repr, choices))}")


def check_components(counts: object) -> None:
    """Raise ValueError unless this is a count, or a mapping from name patterns to counts."""
    if isinstance(counts, Mapping):
        if not counts:
            raise ValueError("n_components={}: expected at least one pattern")
        for pattern, count in counts.items():
            if not isinstance(pattern, str):
                raise ValueError(f"n_components: expected a name pattern such as 'blocks.0.*', got {pattern!r}")
            if not is_whole(count) or count < 1:
                raise ValueError(f"n_components[{pattern!r}]={count!r}: expected a whole number from 1 up")
    elif not is_whole(counts) or counts < 1:  # type: ignore[operator]
        raise ValueError(f"n_components={counts!r}: expected a whole number from 1 up, or a mapping from patterns to counts")


def counts_by_name(counts: int | Mapping[str, int], names: list[str], field: str = "n_components") -> dict[str, int]:
    """Return the count for each of the names; of several matching patterns, the first decides. Messages name `field`.

    Raises:
        ValueError: a name matches no pattern, or a pattern decides the count of no name.
    """
    if not isinstance(counts, Mapping):
        return dict.fromkeys(names, counts)
    deciding = {name: next((p for p in counts if fnmatchcase(name, p)), None) for name in names}
    for name, pattern in deciding.items():
        if pattern is None:
            raise ValueError(f"{field}={counts!r}: no pattern matches {name}")
    for pattern in counts:
        if pattern not in deciding.values():
            raise ValueError(f"{field}: the pattern {pattern!r} decides about no projection, such as {names[0]}")
    return {name: counts[str(pattern)] for name, pattern in deciding.items()}


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Whether the value is a finite number of a type that a file can hold: an int or a float."""
    return isinstance(value, (int, float)) and as_number(value) is not None


def as_number(value: Any) -> float | None:
    """Return a finite `numbers.Real`, or the element of a 0-d array or 0-d tensor, as a float; None for anything else.

    Tensors on an accelerator do not count, because reading one waits for the device. Neither do tensors that require gradients,
    because they would not get any.
    """
    if isinstance(value, Tensor) and (value.device.type != "cpu" or value.requires_grad):
        return None
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond the range of floats
        return None
    return number if math.isfinite(number) else None


def finite_number(value: object, where: str) -> float:
    """Return the value as a float.

    Raises:
        ValueError: the value is not a finite number; the message names it as `where`.
    """
    number = as_number(value)
    if number is None:
        raise ValueError(f"{where}={value!r}: expected a finite number")
    return number
