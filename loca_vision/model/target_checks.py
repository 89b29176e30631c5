"""Checks before an adapter is injected: targets are linear, the name is free, and no target is part of the head."""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from loca_vision.checks import PARTS, check_layers
from loca_vision.layers.layer_patterns import chosen
from loca_vision.layers.linear_layouts import features
from loca_vision.layers.plain_weight import is_plain_matrix
from loca_vision.layers.targets import Target, canonical, find_targets
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.model.heads import classifier
from loca_vision.model.sharding import refuse_sharded
from loca_vision.model.state import state_of
from loca_vision.model.traversal import slots


def targets_for(model: nn.Module, config: AdapterConfig) -> list[Target]:
    """Return the targets that an adapter with these settings adapts, in the order of the model's modules, without the head.

    Raises:
        ValueError, TypeError: as in `inject`.
    """
    head = {id(parameter) for parameter in classifier(model)}
    everything = [target for target in find_targets(model) if id(target.layer._parameters.get("weight")) not in head]
    patterns = check_layers(config.layers)
    try:
        found = chosen(everything, config.targets, patterns)
    except ValueError as error:
        raise ValueError(f"{error}{_what_is_named(model, patterns or (), head)}") from None
    check_linear(model, found)
    for part in config.targets:
        if not any(target.part == part for target in found) and not _names_all_it_has(part, found, config):
            where = f"in the layers that layers={config.layers!r} chooses" if config.layers is not None else "to adapt"
            raise ValueError(
                f"targets: {type(model).__name__} has no {part!r} projection {where}; it has {_present(model, everything)}"
            )
    return found


def _what_is_named(model: nn.Module, patterns: Sequence[str], head: Container[int]) -> str:
    """Return the end of an error message about a module that the patterns name but that is never adapted, or ""."""
    for path, module in model.named_modules():
        if not any(fnmatchcase(canonical(path), pattern.removeprefix("!")) for pattern in patterns):
            continue
        if id(module._parameters.get("weight")) in head:
            return f"; {path} is the classifier head, which is trained whole"
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and features(module) is None:
            size = " x ".join(map(str, module.kernel_size))
            return f"; {path} is a convolution of {size}, and only linear layers and 1 x 1 convolutions can be adapted"
    return ""


def _names_all_it_has(part: str, found: Sequence[Target], config: AdapterConfig) -> bool:
    """Whether a part may be without projections: "linear" covers all parts, and patterns may name layers of other parts."""
    if part == "linear":
        return bool(found)
    return bool(found) and not any(target.part in config.targets for target in found)


def check_linear(model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise unless every target is a linear layer or a 1 x 1 convolution that can compute with updates.

    Raises:
        ValueError, TypeError: as in `inject`.
    """
    owners: dict[int, tuple[str, str]] = {}
    _check_untied(model, targets)
    for target in targets:
        if target.attention is not None:
            _check_in_attention(target)
            continue
        weight = target.layer._parameters.get("weight")
        known = target.called or target.part == "conv" or (isinstance(target.layer, nn.Linear) and weight is not None)
        if features(target.layer) is None or not known:
            kind = type(target.layer).__name__
            why = "" if weight is not None else ", and this one has no weight parameter of its own"
            raise TypeError(f"{target.name} is a {kind}: adapters go on torch.nn.Linear layers that own their weight{why}")
        if not target.called and not target.convolution:
            _check_readable(model, target)
        first = owners.setdefault(id(weight), (target.layer_path, target.name))
        if weight is not None and first[0] != target.layer_path:
            raise ValueError(f"{target.name} shares its weight with {first[1]}: what adapts the one would change the other")


def _check_untied(model: nn.Module, targets: Sequence[Target]) -> None:
    """Raise ValueError if another module also uses a target's weight, such as an embedding tied to a language model's head."""
    adapted = {id(target.layer): target for target in targets}
    weights = {id(target.layer._parameters.get("weight")): target for target in targets}
    weights.pop(id(None), None)
    for path, module in model.named_modules():
        for parameter in module._parameters.values():
            target = weights.get(id(parameter))
            if target is not None and id(module) not in adapted:
                raise ValueError(
                    f"{target.name} shares its weight with {path}: what adapts the one would change the other; leave it out "
                    f'with layers=["!{target.name}"]'
                )


def _present(model: nn.Module, targets: Sequence[Target]) -> str:
    """Return what could be adapted instead, for an error message."""
    parts = sorted({target.part for target in targets} & {*PARTS} - {"linear"})
    more = ["every linear layer by 'linear'"] if any(target.linear for target in targets) else []
    fused = next((path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)), None)
    if fused is not None:
        more.append(f"torch.nn.MultiheadAttention, as at {fused}, keeps q, k and v where they cannot be adapted")
    return "; ".join([", ".join(parts) or "no attention layer and no MLP that this library knows", *more])


def _check_readable(model: nn.Module, target: Target) -> None:
    """Raise TypeError if a quantised layer's weight is read by its owner.

    A quantised layer is called and the update added to its output, so code that reads the weight would bypass the update.
    """
    if is_plain_matrix(target.layer._parameters.get("weight")):
        return
    owner = model.get_submodule(target.layer_path.rpartition(".")[0])
    if getattr(owner, "q_bias", None) is not None:
        raise TypeError(
            f"{target.name} is quantised, and {type(owner).__name__} reads its weight without calling the layer: "
            "adapt the model before it is quantised, and merge"
        )


def _check_in_attention(target: Target) -> None:
    """Raise TypeError if the layer does not map vectors to vectors, or other code has replaced the attention's `forward`.

    Any layer that maps vectors to vectors will do, because the update is added to its output.
    """
    attention: Any = target.attention
    mine = vars(attention).get("forward")
    hooked = any(hasattr(attention, name) for name in ("_hf_hook", "_diffusers_hook"))
    if mine is not None and not hooked and getattr(mine, "__func__", None) is not type(attention).forward:
        raise TypeError(
            f"{target.name}: other code has replaced the `forward` of that attention layer, and would bypass the adapter"
        )
    sizes = [getattr(target.layer, name, None) for name in ("in_features", "out_features")]
    if not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"{target.name} is a {type(target.layer).__name__}: adapters go on linear layers")


def check_new_name(model: nn.Module, name: object) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", name):
        raise ValueError(f"name={name!r}: an adapter's name is 1 to 100 letters, digits, '_' or '-'")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "the model is wrapped in DistributedDataParallel, which would not see new parameters: wrap it afterwards"
        )
    refuse_sharded(model, "inject or load adapters")
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
