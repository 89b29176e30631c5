"""Adapter weights for the blocks of a UNet, in the form that diffusers' `set_adapters` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from loca_vision.checks import finite_number
from loca_vision.model.state import Strength

_SIDES = {"down": "down_blocks", "up": "up_blocks"}


def block_strengths(model: nn.Module, weights: Any, projections: Sequence[str], where: str) -> Strength:
    """Return one strength, or one for each projection.

    Args:
        model: the model that contains the projections.
        weights: a number, or `{"down": ..., "mid": ..., "up": ...}` with a number each, or under "down" and "up"
            `{"block_1": ...}` with a number or one for each attention of that block. What is not named acts at 1.0.
        projections: the names of the adapter's projections.
        where: what to call the weights in an error message.

    Raises:
        ValueError: a key names no attention of the model, or a weight is not a finite number.
    """
    if not isinstance(weights, Mapping):
        return finite_number(weights, where)
    if not all(hasattr(model, attribute) for attribute in _SIDES.values()):
        raise ValueError(f"{where}={dict(weights)!r}: {type(model).__name__} has no blocks; expected one number")
    strengths = _by_path(model, weights, where)
    return {name: next((s for path, s in strengths.items() if name.startswith(path)), 1.0) for name in projections}


def _by_path(model: Any, weights: Mapping[str, Any], where: str) -> dict[str, float]:
    """Return the strength of everything below a path such as `down_blocks.1.attentions.0.`."""
    found: dict[str, float] = {}
    for side, value in weights.items():
        here = f"{where}[{side!r}]"
        if side == "mid":
            _attentions(getattr(model, "mid_block", None), here)
            single = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1
            found["mid_block."] = finite_number(value[0] if single else value, here)
        elif side in _SIDES:
            found |= _of_side(getattr(model, _SIDES[side]), _SIDES[side], value, here)
        else:
            raise ValueError(f"{here}: the blocks of {type(model).__name__} are 'down', 'mid' and 'up'")
    return found


def _of_side(blocks: Any, path: str, value: Any, where: str) -> dict[str, float]:
    if not isinstance(value, Mapping):
        return {f"{path}.": finite_number(value, where)}
    names = {f"block_{i}": i for i, block in enumerate(blocks) if hasattr(block, "attentions")}
    found: dict[str, float] = {}
    for name, inner in value.items():
        here = f"{where}[{name!r}]"
        if name not in names:
            raise ValueError(f"{here}: the blocks with attention are {', '.join(names)}")
        count = _attentions(blocks[names[name]], here)
        if isinstance(inner, Sequence) and not isinstance(inner, str):
            if len(inner) not in (1, count):
                raise ValueError(f"{here}={list(inner)!r}: {len(inner)} weights for {count} attentions")
            each = list(inner) * (count if len(inner) == 1 else 1)
            found |= {f"{path}.{names[name]}.attentions.{i}.": finite_number(one, here) for i, one in enumerate(each)}
        else:
            found[f"{path}.{names[name]}."] = finite_number(inner, here)
    return found


def _attentions(block: Any, where: str) -> int:
    attentions = getattr(block, "attentions", None)
    if attentions is None:
        raise ValueError(f"{where}: that block has no attention")
    return len(attentions)
