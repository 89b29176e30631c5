"""The blocks of a model in three groups, early to late, so that each group has a strength of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

_GROUPS = ("Early", "Middle", "Late")


def block_of(projection: str) -> str:
    """The path up to its last number, as `blocks.3` of `blocks.3.attn.q`; the path itself where it has none."""
    parts = projection.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else projection


def block_groups(projections: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The projections by group, in which the blocks are as equal in number as can be; {} where there are fewer than 3 blocks.

    Args:
        projections: by name, in the order of the model.

    Returns:
        By a label that names the first and the last block of the group.
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
    """What all paths begin with before their last number, as `blocks.`; "" where they differ in more than that."""
    stems = {name.rpartition(".")[0] for name in names}
    return f"{stems.pop()}." if len(stems) == 1 else ""


def _range(names: Sequence[str]) -> str:
    return f"{names[0]} to {names[-1]}" if len(names) > 1 else names[0]


def strength_of_each(groups: Mapping[str, tuple[str, ...]], strength: float, by_group: Iterable[float]) -> dict[str, float]:
    """The strength of every projection: that of the adapter times that of its group."""
    return {name: strength * own for names, own in zip(groups.values(), by_group, strict=True) for name in names}
