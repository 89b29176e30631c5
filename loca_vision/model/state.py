"""The state of a model with adapters: the active adapters, what was trainable before, and tensors trained as a whole."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loca_vision.layers.built_together import BuiltTogether
from loca_vision.layers.targets import canonical
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.model.traversal import all_updates, learns, unwrap

_ATTRIBUTE = "_loca_record"
_LOG = logging.getLogger(__name__)


Strength = float | Mapping[str, float]  # of an adapter: one number, or one for each of its projections


@dataclass
class Adapter:
    """One named adapter: its settings and the tensors it trains as a whole, such as a classifier head, by name in the model.

    While the adapter supplies these tensors, the model holds the same objects.
    """

    config: AdapterConfig
    modules_to_save: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Fused:
    """The adapters that are fused into the weights.

    Args:
        adapters: their names, and how strongly each was fused.
        originals: the weights before fusing, on the CPU, by the paths of their layers, so that they can be restored bit for
            bit.
        marks: a checksum of each fused weight, which shows whether other code has written to it since.
    """

    adapters: dict[str, Strength] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)


@dataclass
class AdapterState:
    """The state that a model keeps about its adapters.

    Args:
        trainable: `requires_grad` of every parameter before the first adapter.
        base: the base's own objects for all tensors that some adapter trains as a whole.
        first: the objects that the model held for these tensors before the first adapter.
        adapters: the adapters by name, in the order they were added.
        active: the active adapters, and how strongly each acts. The last of them that has whole tensors supplies them.
        enabled: False while all adapters are disabled.
        fused: the adapters that have been written into the weights.
        frozen: whether an adapter froze the model's own parameters; parameters trained since then belong to an adapter.
        hook: lets `load_state_dict` accept a state dict of the base alone.
        together: builds updates of one shape together.
        narrow: the original weight of `conv_in`, while an adapter needs one with more channels.
    """

    trainable: dict[str, bool]
    base: dict[str, Tensor] = field(default_factory=dict)
    first: dict[str, Tensor] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    active: dict[str, Strength] = field(default_factory=dict)
    enabled: bool = True
    fused: Fused = field(default_factory=Fused)
    frozen: bool = False
    hook: RemovableHandle | None = None
    together: BuiltTogether = field(default_factory=BuiltTogether)
    narrow: nn.Parameter | None = None

    @property
    def supplier(self) -> str | None:
        """The adapter whose whole tensors the model holds now: the last active one that has any, or else the last fused one."""
        acting = [*self.fused.adapters, *(self.active if self.enabled else ())]
        return next((name for name in reversed(acting) if self.adapters[name].modules_to_save), None)

    @property
    def supplier_is_fused(self) -> bool:
        """Whether the whole tensors in the model belong to a fused adapter, in which case the weights are not the base's."""
        return self.supplier in self.fused.adapters

    @property
    def effective(self) -> dict[str, Strength]:
        """The adapters whose updates are added to the weights at each call."""
        return {name: strength for name, strength in self.active.items() if self.enabled and name not in self.fused.adapters}


def state_of(model: nn.Module) -> AdapterState | None:
    """Return the state of the model's adapters, or None if it has none."""
    found: AdapterState | None = getattr(unwrap(model), _ATTRIBUTE, None)
    return found


def start_record(model: nn.Module) -> AdapterState:
    """Return the state of the model's adapters, creating it if there is none yet."""
    record = state_of(model)
    if record is None:
        record = AdapterState({canonical(name): p.requires_grad for name, p in model.named_parameters()})
        record.hook = model.register_load_state_dict_post_hook(_allow_the_base)  # type: ignore[no-untyped-call]
        setattr(model, _ATTRIBUTE, record)
    return record


def _allow_the_base(model: nn.Module, keys: Any) -> None:
    """Accept a state dict of the base without any tensor of an adapter as complete, but not one with parts of adapters."""
    own = [key for key in keys.missing_keys if ".loca." in f".{key}"]
    if not own or any(".loca." in f".{key}" for key in keys.unexpected_keys):
        return
    if len(own) == sum(len(update.state_dict()) for update in all_updates(model)):
        keys.missing_keys[:] = [key for key in keys.missing_keys if key not in own]
        if learns(model):
            _LOG.warning(
                "the state dict has no tensor of an adapter: the updates in this %s keep the values they have; to have those "
                "of a file, call remove and load_adapter",
                type(model).__name__,
            )


def end_record(model: nn.Module) -> None:
    """Remove the state, and make parameters as trainable as before the first adapter."""
    record = state_of(model)
    if record is not None:
        for name, parameter in model.named_parameters() if record.frozen else ():
            parameter.requires_grad_(record.trainable.get(canonical(name), parameter.requires_grad))
        if record.hook is not None:
            record.hook.remove()
        delattr(model, _ATTRIBUTE)


def refuse_fused(record: AdapterState, names: Iterable[str]) -> None:
    """Raise ValueError if one of these adapters is fused, because what is in the weights cannot be switched."""
    for name in names:
        if name in record.fused.adapters:
            raise ValueError(f"adapter {name!r} is fused into the weights; call unfuse_loca first")
