"""Put adapters into a model, say which of them act, and take them out again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.attention import AdaptedAttention, adapt_attention, restore_attention
from loca_vision.config import PARTS
from loca_vision.conv_in import WEIGHT, fit_conv_in
from loca_vision.kinds import AdapterConfig
from loca_vision.layer import AdaptedLayer, adapt, restore
from loca_vision.offload import device_for, stored_at
from loca_vision.record import (
    Adapter,
    Record,
    Strength,
    activate,
    adopt,
    end_record,
    moved_by_training,
    own_parameters,
    own_tensors,
    park,
    places,
    record_of,
    refuse_fused,
    sites,
    start_record,
    unwrap,
)
from loca_vision.root import circumstances, forget_circumstances
from loca_vision.targets import Target, find_targets
from loca_vision.update import Update
from loca_vision.updates import Place, WeightUpdates
from loca_vision.weights import write_weights


def inject(
    model: nn.Module, config: AdapterConfig, name: str = "default", *, modules_to_save: Sequence[str] = ()
) -> tuple[str, ...]:
    """Adapt the projections `config.targets` of every attention layer (and MLP of a ViT) of a model.

    The model's own parameters are frozen, a timm classifier head stays trainable. Updates start at zero, so the
    output is bit-identical at first; adapters that act already go on acting. Every key of the base `state_dict` stays.

    Args:
        model: any timm model with attention layers, a diffusers UNet or transformer, a CLIP or T5 text encoder; or a module
            that contains one.
        config: what to inject: a LoCAConfig, or one of another kind.
        name: of the adapter, letters, digits, `_` and `-`.
        modules_to_save: names of modules that are trained whole beside the updates and belong to the adapter from now on: they
            are saved with it, and leave with it. As peft has it.

    Returns:
        The names of the adapted projections, "<path of the attention layer>.<part>", in the order of the model's modules.

    Raises:
        ValueError: the name is in use, a part of `config.targets` or a module to save is nowhere in the model, or the settings
            do not fit it.
        TypeError: a target is not a `torch.nn.Linear` with a weight of its own.
        In each case before the model is touched.
    """
    if not isinstance(config, AdapterConfig):
        raise TypeError(f"config is a {type(config).__name__}: a LoCAConfig, or one of another kind, is wanted")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: inject into a module; of a pipeline, into a component such as pipe.unet"
        )
    check_new_name(model, name)
    model = unwrap(model)
    found = linear_targets(model, config.targets)
    whole = _parameters_of(model, modules_to_save, found)
    attach(model, name, Adapter(config, whole), list(zip(found, config.created(found), strict=True)))
    return tuple(target.name for target in found)


def _parameters_of(model: nn.Module, modules: Sequence[str], targets: Sequence[Target]) -> dict[str, Tensor]:
    """Copies of the parameters of these modules, by name."""
    if isinstance(modules, str):
        raise ValueError(f"modules_to_save={modules!r}: names come as a sequence")
    keys: list[str] = []
    for module in modules:
        inside = [key for key in own_parameters(model) if key.startswith(f"{module}.")]
        if not inside:
            raise ValueError(f"modules_to_save={module!r}: the model has no module of that name with parameters")
        adapted = next((target.name for target in targets if f"{target.layer_path}.".startswith(f"{module}.")), None)
        if adapted is not None:
            raise ValueError(f"modules_to_save={module!r}: {adapted} is in there, which is adapted")
        keys += inside
    return {key: stored_at(model, key).detach().clone() for key in keys}


def attach(model: nn.Module, name: str, adapter: Adapter, placed: list[tuple[Target, Update]], *, freeze: bool = True) -> None:
    """Put updates made beforehand into their layers; the adapter acts at 1.0 at once. Nothing here can be refused any more.

    Whole tensors given with the adapter go into the model, whose `conv_in` is widened for one of more channels. With `freeze`
    everything else of the model stops learning but a classifier head, which becomes the adapter's own where it brings none;
    without, as for inference, all stays as it is.
    """
    record = start_record(model)
    tensors = own_tensors(model)
    if record.frozen:
        adopt(record, tensors)
    if freeze:
        record.frozen = True
        head = classifier(model)
        for key, parameter in own_parameters(model).items():
            learns = key in adapter.whole or any(parameter is p for p in head)
            parameter.requires_grad_(learns)
            if not learns:
                parameter.grad = None  # an optimiser made before would still apply it
    park(model, record)
    own = moved_by_training(tensors) if freeze else {}
    live = {key: stored_at(model, key).detach().clone() for key in (own | adapter.whole)}
    record.base = {key: value.clone() for key, value in live.items()} | record.base
    adapter.whole = {key: live[key] for key in own} | adapter.whole
    record.adapters[name] = adapter
    fit_conv_in(model, record)
    for target, update in placed:
        updates = updates_of(target)
        if target.attention is not None:
            updates.shared = (circumstances(model),)
        updates.add(Place(name, target.name, target.rows), update.to(device_for(target.layer)))
    activate(model, record, record.active | {name: 1.0}, enabled=True)


def updates_of(target: Target) -> WeightUpdates:
    """The updates of the target's weight, which its layer computes with from now on."""
    if target.attention is not None:
        return adapt_attention(target.attention).part(target.name.rpartition(".")[2])
    return adapt(target.layer)


def remove(model: nn.Module, name: str | None = None, *, merge: bool = False) -> None:
    """Take one adapter, or all of them, out of the model.

    Without `merge` the base is back bit for bit, the head, a `conv_in` of fewer channels and the statistics of batch
    normalisation included; with it, what acts now is folded into the weights (rounded once to their dtype) and a trained head
    or `conv_in` stays, unless an adapter that goes on acting has its own. After the last adapter all layers have their own
    classes again, and parameters are as trainable as they were before the first. What the user made trainable beside the head
    since `inject` keeps its values.

    Raises:
        ValueError: no such adapter, or `merge` of a named one that does not act.
    """
    model = unwrap(model)
    record = _record(model)
    names = list(record.adapters) if name is None else [_known(record, name)]
    refuse_fused(record, names)
    if merge and name is not None and name not in record.active:
        raise ValueError(f"adapter {name!r} does not act, so there is nothing to merge; call set_adapters first")
    if merge:
        _merge(model, record, [n for n in names if n in record.active])
    for site in sites(model):
        for gone in names:
            site.updates.discard(gone)
    for host in dict.fromkeys(site.host for site in sites(model)):
        release(host)
    remaining = {n: weight for n, weight in record.active.items() if n not in names}
    activate(model, record, remaining)
    for gone in names:
        del record.adapters[gone]
    fit_conv_in(model, record)
    if not record.adapters:
        end_record(model)
        forget_circumstances(model)


def release(host: AdaptedLayer | AdaptedAttention) -> None:
    """Give a layer without any update left its own class back."""
    if isinstance(host, AdaptedLayer):
        if not host.loca.places:
            restore(host)
    elif not any(updates.places for updates in host.loca.parts()):
        restore_attention(host)


@torch.no_grad()
def _merge(model: nn.Module, record: Record, names: list[str]) -> None:
    write_weights(model, {name: record.active[name] for name in names})
    if record.supplier in names:
        park(model, record)
        merged = record.adapters[record.supplier].whole
        record.base |= merged
        if WEIGHT in merged:
            record.narrow = None  # the model's own is the wide one from now on


def adapters(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """The updates of one adapter by projection, in the order of the model's modules: of LoCA, each a `Spectrum`.

    Raises:
        ValueError: no such adapter.
    """
    _known(_record(model), name)
    entries = (entry for site in sites(model) for entry in site.updates.entries())
    return {place.projection: update for place, update in entries if place.adapter == name}


def set_adapters(
    model: nn.Module, names: str | Sequence[str], weights: float | Sequence[float] | Mapping[str, float] | None = None
) -> None:
    """Let these adapters act, with these weights (1.0 each by default), and no others. An empty sequence: the base model.

    Whole tensors (a classifier head) come from the last adapter named that has any.

    Raises:
        ValueError: an unknown or repeated name, a weight that is not finite, or another number of weights than names.
    """
    record = _record(model)
    if isinstance(names, Mapping):
        raise ValueError(f"names={dict(names)!r}: names come as a sequence, their weights as the next argument")
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        _known(record, name)
    if len(set(names)) < len(names):
        raise ValueError(f"names={names!r}: an adapter is named twice")
    refuse_fused(record, names or record.fused.adapters)  # the base model is not to be had then
    strengths: list[Strength] = [*_strengths(names, weights)]
    activate(unwrap(model), record, dict(zip(names, strengths, strict=True)), enabled=True)


def _strengths(names: list[str], weights: float | Sequence[float] | Mapping[str, float] | None) -> list[float]:
    """One finite number for each name, in whichever form they came."""
    if weights is None or isinstance(weights, (int, float)):
        weights = [1.0 if weights is None else weights] * len(names)
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"weights={dict(weights)!r}: one weight for each of {names!r} is wanted")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise ValueError(f"weights={list(weights)!r}: {len(weights)} weights for {len(names)} adapters")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"weights={list(weights)!r}: a weight is a finite number")
    return list(map(float, weights))


def active_adapters(model: nn.Module) -> dict[str, Strength]:
    """The adapters that act, and how strongly: a number, or a number for each projection; empty for a model without any."""
    record = record_of(model)
    return dict(record.active) if record else {}


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
    record = record_of(model)
    known = record.adapters if record else {}
    if name in known:
        raise ValueError(f"name={name!r}: the model has an adapter of that name; remove it first or choose another")
    for place in places(model):
        if place.adapter not in known:
            raise ValueError(
                f"{place.projection} has the adapter {place.adapter!r} through another module, above or below this one; "
                "remove it there"
            )


def _record(model: nn.Module) -> Record:
    record = record_of(model)
    if record is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has no adapter; inject or load one first")
    return record


def _known(record: Record, name: str) -> str:
    if name not in record.adapters:
        raise ValueError(f"no adapter {name!r} in the model; it has {', '.join(map(repr, record.adapters))}")
    return name
