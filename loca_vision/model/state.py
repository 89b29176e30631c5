"""What a model with adapters remembers: active adapters, what was trainable before, tensors trained as a whole."""

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

    While the adapter supplies them, the model holds these very objects.
    """

    config: AdapterConfig
    modules_to_save: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Fused:
    """The adapters that are fused into the weights.

    Args:
        adapters: their names, and how strongly each was fused.
        originals: the weights before, by the paths of their layers, on the CPU, to be put back bit for bit.
        marks: a checksum of each fused weight, which tells whether other code has written to it since.
    """

    adapters: dict[str, Strength] = field(default_factory=dict)
    originals: dict[str, Tensor] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)


@dataclass
class AdapterState:
    """What a model remembers of its adapters.

    Args:
        trainable: `requires_grad` of every parameter before the first adapter.
        base: the base's own objects for all tensors that some adapter trains as a whole.
        first: the objects that the model held for them before the first adapter.
        adapters: by name, in the order they came.
        active: the active adapters, and how strongly each acts. The last of them that has whole tensors supplies them.
        enabled: False while all adapters are disabled.
        fused: what has been written into the weights.
        frozen: whether an adapter froze the model's own parameters; parameters that learn since then belong to an adapter.
        hook: lets `load_state_dict` accept a state dict of the base alone.
        together: builds updates of one shape together.
        narrow: the weight of `conv_in` from before an adapter came that takes more channels.
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
        """The adapter whose whole tensors the model holds now: the last one that acts, or is fused, and has any."""
        acting = [*self.fused.adapters, *(self.active if self.enabled else ())]
        return next((name for name in reversed(acting) if self.adapters[name].modules_to_save), None)

    @property
    def supplier_is_fused(self) -> bool:
        """Whether the whole tensors in the model belong to a fused adapter, so that the weights are not the base's either."""
        return self.supplier in self.fused.adapters

    @property
    def effective(self) -> dict[str, Strength]:
        """The adapters whose updates are added to the weights at each call."""
        return {name: strength for name, strength in self.active.items() if self.enabled and name not in self.fused.adapters}


def state_of(model: nn.Module) -> AdapterState | None:
    """The state of the model's adapters; None for a model without any."""
    found: AdapterState | None = getattr(unwrap(model), _ATTRIBUTE, None)
    return found


def start_record(model: nn.Module) -> AdapterState:
    """The state of the model's adapters; a new one if it has none yet."""
    record = state_of(model)
    if record is None:
        record = AdapterState({canonical(name): p.requires_grad for name, p in model.named_parameters()})
        record.hook = model.register_load_state_dict_post_hook(_allow_the_base)  # type: ignore[no-untyped-call]
        setattr(model, _ATTRIBUTE, record)
    return record


def _allow_the_base(model: nn.Module, keys: Any) -> None:
    """A state dict of the base, without a tensor of any adapter, is complete; half an adapter, or another one, is not."""
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
    """Forget the adapters, and let parameters be as trainable as before the first."""
    record = state_of(model)
    if record is not None:
        for name, parameter in model.named_parameters() if record.frozen else ():
            parameter.requires_grad_(record.trainable.get(canonical(name), parameter.requires_grad))
        if record.hook is not None:
            record.hook.remove()
        delattr(model, _ATTRIBUTE)


def refuse_fused(record: AdapterState, names: Iterable[str]) -> None:
    """Raise if one of these adapters is fused: what is in the weights cannot be switched."""
    for name in names:
        if name in record.fused.adapters:
            raise ValueError(f"adapter {name!r} is fused into the weights; call unfuse_loca first")
