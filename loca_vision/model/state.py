"""What a model with adapters remembers: active adapters, what was trainable before, tensors trained as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.model.traversal import all_updates, unwrap

_ATTRIBUTE = "_loca_record"


Strength = float | Mapping[str, float]  # of an adapter: one number, or one for each of its projections


@dataclass
class Adapter:
    """One named adapter: its settings and its whole tensors, such as a classifier head, by their names in the model.

    Their values here count while the adapter does not supply them to the model; while it does, those in the model count.
    """

    config: AdapterConfig
    modules_to_save: dict[str, Tensor] = field(default_factory=dict)


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
class AdapterState:
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
        return next((name for name in reversed(acting) if self.adapters[name].modules_to_save), None)

    @property
    def supplier_is_fused(self) -> bool:
        """Whether the whole tensors in the model belong to what is in the weights too, so that it is not the base."""
        return self.supplier in self.fused.adapters

    @property
    def effective(self) -> dict[str, Strength]:
        """The adapters whose updates are to be added to what the weights hold."""
        return {name: strength for name, strength in self.active.items() if self.enabled and name not in self.fused.adapters}


def state_of(model: nn.Module) -> AdapterState | None:
    found: AdapterState | None = getattr(unwrap(model), _ATTRIBUTE, None)
    return found


def start_record(model: nn.Module) -> AdapterState:
    """The model's record; a new one where it has none yet."""
    record = state_of(model)
    if record is None:
        record = AdapterState({name: p.requires_grad for name, p in model.named_parameters()})
        record.hook = model.register_load_state_dict_post_hook(_allow_the_base)  # type: ignore[no-untyped-call]
        setattr(model, _ATTRIBUTE, record)
    return record


def _allow_the_base(model: nn.Module, keys: Any) -> None:
    """A `state_dict` of the base, without a tensor of any adapter, is complete as it is; half an adapter is not."""
    own = [key for key in keys.missing_keys if ".loca." in f".{key}"]
    if len(own) == sum(len(update.state_dict()) for update in all_updates(model)):
        keys.missing_keys[:] = [key for key in keys.missing_keys if key not in own]


def end_record(model: nn.Module) -> None:
    record = state_of(model)
    if record is not None:
        for name, parameter in model.named_parameters() if record.frozen else ():
            parameter.requires_grad_(record.trainable.get(name, parameter.requires_grad))
        if record.hook is not None:
            record.hook.remove()
        delattr(model, _ATTRIBUTE)


def refuse_fused(record: AdapterState, names: Iterable[str]) -> None:
    """Raise where one of these adapters is in the weights: what acts there cannot be changed from outside."""
    for name in names:
        if name in record.fused.adapters:
            raise ValueError(f"adapter {name!r} is fused into the weights; call unfuse_loca first")
