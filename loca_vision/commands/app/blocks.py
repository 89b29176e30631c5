"""The blocks of a model in three groups, early to late, so that each group can have its own strength."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

_GROUPS = ("Early", "Middle", "Late")


def block_of(projection: str) -> str:
    """Return the path up to its last number, such as `blocks.3` of `blocks.3.attn.q`, or the whole path if it has none."""
    parts = projection.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else projection


def block_groups(projections: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group the projections by blocks, as evenly as possible; {} if there are fewer than 3 blocks.

    Args:
        projections: names of projections, in the order of the model.

    Returns:
        The projections of each group, by a label that names its first and last block.
    """
    blocks: dict[str, list[str]] = {}
    for projection in projections:
        blocks.setdefault(block_of(projection), []).append(projection)
    names, count = list(blocks), len(_GROUPS)
    if len(names) < count:
        return {}
    bounds = [len(names) * i // count for i in range(count + 1)]
    parts = [names[low:high] for low, high in pairwise(bounds)]
    stem = _stem(names)
    labels = [
        f"{group}, {_range([name.removeprefix(stem) for name in part])}" for group, part in zip(_GROUPS, parts, strict=True)
    ]
    return {label: tuple(p for name in part for p in blocks[name]) for label, part in zip(labels, parts, strict=True)}


def _stem(names: Sequence[str]) -> str:
    """Return what all paths have before their last number, such as `blocks.`; "" if they differ in more than that number."""
    stems = {name.rpartition(".")[0] for name in names}
    return f"{stems.pop()}." if len(stems) == 1 else ""


def _range(names: Sequence[str]) -> str:
    return f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]


def strength_of_each(groups: Mapping[str, tuple[str, ...]], strength: float, by_group: Iterable[float]) -> dict[str, float]:
    """Return the strength of every projection: the adapter's times its group's."""
    return {name: strength * own for names, own in zip(groups.values(), by_group, strict=True) for name in names}
