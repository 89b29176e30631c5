"""What a model with adapters has to remember: which act, what was trainable before, and whole tensors trained beside them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from loca_vision.attention import AdaptedAttention
from loca_vision.kinds import AdapterConfig
from loca_vision.layer import AdaptedLayer
from loca_vision.offload import stored_at
from loca_vision.update import Update
from loca_vision.updates import Place, Reading, WeightUpdates

_ATTRIBUTE = "_loca_record"


Strength = float | Mapping[str, float]  # of an adapter: one number, or one for each of its projections


@dataclass
class Adapter:
    """One named adapter: its settings and its whole tensors, such as a classifier head, by their names in the model.

    Their values here count while the adapter does not supply them to the model; while it does, those in the model count.
    """

    config: AdapterConfig
    whole: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Fused:
    """
    Args:
        adapters: those in the weights, and how strongly.
        originals: the weights before, by the paths of their layers, on the CPU, to be put back bit for bit.
        marks: a checksum of each weight with them in it, which tells whether another hand has written to it since.
    """

    adapters: dict[str, Strength] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)


@dataclass
class Record:
    """
    Args:
        trainable: `requires_grad` of every parameter before the first adapter.
        base: the model's own values of all tensors that some adapter trains whole.
        adapters: by name, in the order they came.
        active: the adapters that act, and how strongly. The last of them that has whole tensors supplies them.
        enabled: whether any acts at all for now.
        fused: what has been written into the weights.
        frozen: whether an adapter froze the model's own parameters: what learns since is meant to.
        hook: lets `load_state_dict` take the base's own.
        narrow: the weight that `conv_in` had before an adapter came whose own takes more channels.
    """

    trainable: dict[str, bool]
    base: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, Strength] = field(default_factory=dict)
    enabled: bool = True
    fused: Fused = field(default_factory=Fused)
    frozen: bool = False
    hook: RemovableHandle | None = None
    narrow: nn.Parameter | None = None

    @property
    def supplier(self) -> str | None:
        """The adapter whose whole tensors are in the model now: the last that acts, or is fused, and has any."""
        acting = [*self.fused.adapters, *(self.active if self.enabled else ())]
        return next((name for name in reversed(acting) if self.adapters[name].whole), None)

    @property
    def supplier_is_fused(self) -> bool:
        """Whether the whole tensors in the model belong to what is in the weights too, so that it is not the base."""
        return self.supplier in self.fused.adapters

    @property
    def effective(self) -> dict[str, Strength]:
        """The adapters whose updates are to be added to what the weights hold."""
        return {name: strength for name, strength in self.active.items() if self.enabled and name not in self.fused.adapters}


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside `torch.compile`'s and data parallel wrappers."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def record_of(model: nn.Module) -> Record | None:
    found: Record | None = getattr(unwrap(model), _ATTRIBUTE, None)
    return found


def start_record(model: nn.Module) -> Record:
    """The model's record; a new one where it has none yet."""
    record = record_of(model)
    if record is None:
        record = Record({name: p.requires_grad for name, p in model.named_parameters()})
        record.hook = model.register_load_state_dict_post_hook(_allow_the_base)  # type: ignore[no-untyped-call]
        setattr(model, _ATTRIBUTE, record)
    return record


def _allow_the_base(model: nn.Module, keys: Any) -> None:
    """A `state_dict` of the base, without a tensor of any adapter, is complete as it is; half an adapter is not."""
    own = [key for key in keys.missing_keys if ".loca." in f".{key}"]
    if len(own) == sum(len(update.state_dict()) for update in all_updates(model)):
        keys.missing_keys[:] = [key for key in keys.missing_keys if key not in own]


def end_record(model: nn.Module) -> None:
    record = record_of(model)
    if record is not None:
        for name, parameter in model.named_parameters() if record.frozen else ():
            parameter.requires_grad_(record.trainable.get(name, parameter.requires_grad))
        if record.hook is not None:
            record.hook.remove()
        delattr(model, _ATTRIBUTE)


@dataclass(frozen=True)
class Site:
    """The updates of one weight, and the layer whose class was exchanged for them."""

    updates: WeightUpdates
    host: AdaptedLayer | AdaptedAttention


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """As `model.modules()`, in the same order, without the names that it makes up on the way: a third of the time."""
    waiting: list[nn.Module | None] = [unwrap(model)]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting.extend(reversed(module._modules.values()))


def sites(model: nn.Module) -> list[Site]:
    """Where updates are, in the order of the model's modules."""
    found: list[Site] = []
    for module in modules_of(model):
        if isinstance(module, AdaptedLayer):
            found.append(Site(module.loca, module))
        elif isinstance(module, AdaptedAttention):
            found += [Site(updates, module) for updates in module.loca.parts()]
    return found


def places(model: nn.Module) -> list[Place]:
    """Every adapted projection of every adapter."""
    return [place for site in sites(model) for place in site.updates.places]


def refuse_fused(record: Record, names: Iterable[str]) -> None:
    """Raise where one of these adapters is in the weights: what acts there cannot be changed from outside."""
    for name in names:
        if name in record.fused.adapters:
            raise ValueError(f"adapter {name!r} is fused into the weights; call unfuse_loca first")


def all_updates(model: nn.Module) -> list[Update]:
    """Every update of every adapter of the model."""
    return [module for module in modules_of(model) if isinstance(module, Update)]


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters without those of its adapters."""
    inside = {id(p) for update in all_updates(model) for p in update.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in inside}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """`own_parameters`, and the running statistics of batch normalisation, which training moves without a gradient."""
    norms = {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    statistics = {
        f"{path}.{name}": buffer for path, norm in norms.items() for name, buffer in norm.named_buffers(recurse=False)
    }
    return {**own_parameters(model), **statistics}


def moved_by_training(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a model's own tensors: trainable parameters and running statistics."""
    return {name: t for name, t in tensors.items() if t.requires_grad or not isinstance(t, nn.Parameter)}


def acting_updates(model: nn.Module) -> list[Update]:
    """Every update but those of adapters that do not act."""
    entries = [(site.updates, *pair) for site in sites(model) for pair in site.updates.entries()]
    idle = {id(update) for updates, place, update in entries if place.adapter not in updates.strengths}
    return [update for update in all_updates(model) if id(update) not in idle]


@contextmanager
def changing(model: nn.Module, record: Record) -> Iterator[None]:
    """Around a change of what acts: the whole tensors in the model, and how strongly every update acts, follow it."""
    park(model, record)
    try:
        yield
    finally:
        supply(model, record)
        strengthen(model, record)


def activate(model: nn.Module, record: Record, active: dict[str, Strength], *, enabled: bool | None = None) -> None:
    """Let exactly these adapters act, or, with `enabled` False, be the ones that will."""
    with changing(model, record):
        record.active = active
        record.enabled = record.enabled if enabled is None else enabled


def strengthen(model: nn.Module, record: Record) -> None:
    """Tell every update how strongly it acts: as the record says, unless it is disabled or fused into the weights."""
    readings = [module for module in modules_of(model) if isinstance(module, Reading)]
    for updates in readings:
        if isinstance(updates, WeightUpdates):
            updates.strengths = strengths_at(updates, record.effective)
    for reading in readings:
        reading.refresh()


def strengths_at(updates: WeightUpdates, strengths: Mapping[str, Strength]) -> dict[str, float]:
    """How strongly each of these adapters acts on one weight."""
    found: dict[str, float] = {}
    for place in updates.places:
        if place.adapter in strengths:
            strength = strengths[place.adapter]
            found[place.adapter] = strength[place.projection] if isinstance(strength, Mapping) else strength
    return found


@torch.no_grad()
def adopt(record: Record, tensors: dict[str, Tensor]) -> None:
    """Count what the user has made trainable since the last adapter came among that adapter's whole tensors."""
    forget_lost(record, tensors)
    if record.supplier:
        found = {name: t.detach().clone() for name, t in moved_by_training(tensors).items() if name not in record.base}
        record.adapters[record.supplier].whole |= found
        record.base |= {name: value.clone() for name, value in found.items()}


def forget_lost(record: Record, tensors: dict[str, Tensor]) -> None:
    """Drop whole tensors that the model no longer has, or has in another shape: its head was exchanged."""
    for values in (record.base, *(adapter.whole for adapter in record.adapters.values())):
        for name in [n for n, value in values.items() if n not in tensors or tensors[n].shape != value.shape]:
            del values[name]


@torch.no_grad()
def park(model: nn.Module, record: Record) -> None:
    """Keep the values that the supplying adapter has reached by now."""
    if not record.base:  # to look at every parameter takes milliseconds
        return
    forget_lost(record, own_tensors(model))
    if record.supplier:
        whole = record.adapters[record.supplier].whole
        whole.update({name: stored_at(model, name).detach().clone() for name in whole})


@torch.no_grad()
def supply(model: nn.Module, record: Record) -> None:
    """Put the supplying adapter's whole tensors into the model, and the model's own where it has none."""
    whole = record.adapters[record.supplier].whole if record.supplier else {}
    for name, own in record.base.items():
        stored_at(model, name).copy_(whole.get(name, own))
