"""Checks before anything is injected: targets are linear, the name is free, where the head is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from loca_vision.checks import PARTS
from loca_vision.layers.targets import Target, find_targets
from loca_vision.model.state import state_of
from loca_vision.model.traversal import slots


def linear_targets(model: nn.Module, parts: Sequence[str]) -> list[Target]:
    """Targets of every wanted part, all of them linear layers outside the classifier head.

    Raises:
        ValueError, TypeError: as `inject`.
    """
    head = {id(parameter) for parameter in classifier(model)}
    found: list[Target] = []
    owners: dict[int, tuple[str, str]] = {}
    for target in find_targets(model, parts):
        weight = target.layer._parameters.get("weight")
        if target.attention is not None:
            _check_linear(target)
            found.append(target)
            continue
        if not isinstance(target.layer, nn.Linear) or weight is None:
            kind = type(target.layer).__name__
            why = "" if weight is not None else ", and this one has no weight parameter of its own"
            raise TypeError(f"{target.name} is a {kind}: adapters go on torch.nn.Linear layers that own their weight{why}")
        if id(weight) not in head:
            found.append(target)
            first = owners.setdefault(id(weight), (target.layer_path, target.name))
            if first[0] != target.layer_path:
                raise ValueError(f"{target.name} shares its weight with {first[1]}: what adapts the one would change the other")
    for part in parts:
        if not any(target.part == part for target in found):
            there = ", ".join(sorted({target.part for target in find_targets(model, PARTS)}))
            there = there or "no attention layer and no MLP"
            raise ValueError(f"targets: {type(model).__name__} has no {part!r} projection to adapt; it has {there}")
    return found


def _check_linear(target: Target) -> None:
    """Any layer that maps vectors to vectors will do: the update is added to what it answers."""
    attention: Any = target.attention
    mine = vars(attention).get("forward")
    hooked = any(hasattr(attention, name) for name in ("_hf_hook", "_diffusers_hook"))
    if mine is not None and not hooked and getattr(mine, "__func__", None) is not type(attention).forward:
        raise TypeError(
            f"{target.name}: somebody has put a forward of their own on that attention layer, which would go around it"
        )
    sizes = [getattr(target.layer, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"{target.name} is a {type(target.layer).__name__}: adapters go on linear layers")


def classifier(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a timm model's classifier head, wherever in `model` that timm model is.

    `get_classifier` leaves out the second head of VOLO, which the model's configuration names.
    """
    owner: Any = next((module for module in model.modules() if hasattr(module, "get_classifier")), None)
    if owner is None:
        return []
    head, named = owner.get_classifier(), (getattr(owner, "pretrained_cfg", None) or {}).get("classifier") or ()
    heads = [*(head if isinstance(head, (tuple, list)) else [head])]
    for name in (named,) if isinstance(named, str) else named:
        heads += [module for path, module in owner.named_modules() if path == name]
    found = [parameter for module in heads if isinstance(module, nn.Module) for parameter in module.parameters()]
    return list({id(parameter): parameter for parameter in found}.values())


def check_new_name(model: nn.Module, name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
        raise ValueError(f"name={name!r}: an adapter's name is 1 to 100 letters, digits, '_' or '-'")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, which would not see new parameters: wrap it afterwards"
        )
    record = state_of(model)
    known = record.adapters if record else {}
    if name in known:
        raise ValueError(f"name={name!r}: the model has an adapter of that name; remove it first or choose another")
    for slot in slots(model):
        if slot.adapter not in known:
            raise ValueError(
                f"{slot.projection} has the adapter {slot.adapter!r} through another module, above or below this one; "
                "remove it there"
            )
