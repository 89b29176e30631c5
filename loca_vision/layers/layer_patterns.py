"""Name patterns that select which projections of a model an adapter is applied to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from loca_vision.layers.targets import Target
from loca_vision.messages import nearest

# Modules that other code inserts into a model: the image projection and the processors of an IP-Adapter, and the motion
# modules of AnimateDiff. They do not belong to the model itself, so only a pattern that contains such a name selects them.
GUESTS = ("encoder_hid_proj", "image_proj", "motion_modules", "processor")


def chosen(targets: Sequence[Target], parts: Sequence[str], patterns: Sequence[str] | None) -> list[Target]:
    """Return the targets of a model that an adapter is applied to.

    Args:
        targets: all targets of the model, of every part.
        parts, patterns: `targets` and `layers` of an `AdapterConfig`.

    Raises:
        ValueError: a pattern matches nothing.
    """
    wanted = [target for target in targets if target.part in parts or ("linear" in parts and target.linear)]
    included = [pattern for pattern in patterns or () if not pattern.startswith("!")]
    found = {id(target) for target in wanted if not included and _guest_in(target) is None}
    for pattern in included:
        found |= {id(target) for target in _included(pattern, wanted, targets, parts)}
    for pattern in (pattern[1:] for pattern in patterns or () if pattern.startswith("!")):
        out = {id(target) for target in targets if _fits(pattern, target)}
        if not out:
            raise _fits_nothing(f"!{pattern}", targets, parts)
        found -= out
    return [target for target in targets if id(target) in found]


def _included(pattern: str, wanted: Sequence[Target], targets: Sequence[Target], parts: Sequence[str]) -> list[Target]:
    """Return the wanted targets that a pattern matches or, if there are none, any targets whose own name or path it matches."""
    fitting = [target for target in wanted if _reaches(pattern, target) and _fits(pattern, target)]
    fitting = fitting or [target for target in targets if _reaches(pattern, target) and _names(pattern, target)]
    if not fitting:
        raise _fits_nothing(pattern, targets, parts)
    return fitting


def _reaches(pattern: str, target: Target) -> bool:
    """Whether the target belongs to the model itself or to an inserted module that the pattern names."""
    guest = _guest_in(target)
    return guest is None or guest in pattern


def _guest_in(target: Target) -> str | None:
    parts = target.layer_path.split(".")
    if "image_projection_layers" not in parts:  # any other `encoder_hid_proj` belongs to the model itself
        parts = [part for part in parts if part != "encoder_hid_proj"]
    return next((guest for guest in GUESTS if guest in parts), None)


def _names(pattern: str, target: Target) -> bool:
    return fnmatchcase(target.name, pattern) or fnmatchcase(target.layer_path, pattern)


def _fits(pattern: str, target: Target) -> bool:
    return any(fnmatchcase(path, pattern) for path in _paths(target))


def _paths(target: Target) -> Iterator[str]:
    """Yield the projection's name, the path of its layer and the paths of all modules that contain the layer."""
    yield target.name
    path = target.layer_path
    while path:
        yield path
        path = path.rpartition(".")[0]


def _fits_nothing(pattern: str, targets: Sequence[Target], parts: Sequence[str]) -> ValueError:
    others = dict.fromkeys(target.part for target in targets if _fits(pattern.removeprefix("!"), target))
    if others:
        return ValueError(
            f"layers: the pattern {pattern!r} fits {', '.join(others)} projections of the model, and none of "
            f"targets={tuple(parts)!r}"
        )
    paths = {path for target in targets for path in _paths(target)}
    known = [*dict.fromkeys(part for path in sorted(paths) for part in path.split(".")), *sorted(paths)]
    near = nearest(pattern.removeprefix("!").strip("*."), known)
    return ValueError(f"layers: the pattern {pattern!r} fits no projection of the model{near}")
