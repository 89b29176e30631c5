"""Write updates into the weights of a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loca_vision.layers.adapted_attention import AdaptedAttention
from loca_vision.layers.adapted_linear import AdaptedLayer
from loca_vision.layers.attention_layouts import base_of, child
from loca_vision.layers.effective_weight import EffectiveWeight
from loca_vision.layers.plain_weight import as_matrix
from loca_vision.model.activation import strengths_at
from loca_vision.model.state import Strength
from loca_vision.model.traversal import sites, unwrap
from loca_vision.offload import stored


@dataclass(frozen=True)
class Weight:
    """One weight that updates act on.

    Args:
        path, layer: of the linear layer.
        effective_weight: its W + Delta W.
        stack: the paths of the layers whose weights it stacks, for a projection that fuses several.
    """

    path: str
    layer: nn.Module
    effective_weight: EffectiveWeight
    stack: tuple[str, ...] = ()

    @property
    def tensor(self) -> Tensor:
        """W (p, q), to be read and written in place, wherever it is kept.

        Raises:
            ValueError: it is not a matrix of floating-point numbers.
        """
        weight = as_matrix(stored(self.layer, "weight") if "weight" in self.layer._parameters else None)
        if weight is None:
            kind = type(self.layer).__name__
            raise ValueError(f"{self.path} is a {kind} without a plain floating-point weight: nothing can be written into it")
        return weight


def weights(model: nn.Module) -> list[Weight]:
    """Every weight that adapters have updates for, acting or not; of fused projections what is stacked and the stack."""
    found: list[Weight] = []
    for path, module in unwrap(model).named_modules():
        if isinstance(module, AdaptedLayer):
            found.append(Weight(path, module, module.loca))
        elif isinstance(module, AdaptedAttention):
            for name, effective_weight in module.loca.effective_weights(module):
                if effective_weight.all_updates():
                    stack = tuple(f"{path}.{part}" for part in module.loca.stacked(module, name))
                    found.append(Weight(f"{path}.{name}", base_of(child(module, name)), effective_weight, stack))
    return found


def stacked(model: nn.Module, weight: Weight) -> Tensor:
    """What a stack of weights should be: those of its parts, as they are now."""
    layers = [base_of(unwrap(model).get_submodule(path)) for path in weight.stack]
    return torch.cat([stored(layer, "weight").to(weight.tensor.device) for layer in layers])


@contextmanager
def acting_at(model: nn.Module, strengths: Mapping[str, Strength]) -> Iterator[None]:
    """Inside, exactly these adapters act, at these strengths."""
    before = [(site.updates, site.updates.strengths) for site in sites(model)]
    try:
        for site in sites(model):
            site.updates.strengths = strengths_at(site.updates, strengths)
        yield
    finally:
        for updates, acting in before:
            updates.strengths = acting


def _check_dependent(model: nn.Module, written: Collection[str]) -> None:
    """The change a weight-decomposed adapter makes is of W as it was when the adapter came, not with another in it."""
    for site in sites(model):
        changed = {slot.projection for slot, _ in site.updates.entries() if slot.adapter in written}
        for slot, update in site.updates.entries():
            goes_on = slot.adapter in site.updates.strengths and slot.adapter not in written
            if goes_on and update.needs_weight and slot.projection in changed:
                raise ValueError(
                    f"{slot.projection}: adapter {slot.adapter!r} depends on the weight, which would be changed under it; "
                    f"write it into the weight too, or first let it not act"
                )


@torch.no_grad()
def write_weights(model: nn.Module, strengths: Mapping[str, Strength], *, check: bool = True) -> None:
    """W + the updates of these adapters, at these strengths, into every weight they have updates for.

    Args:
        check: build every weight before the first is written, and refuse one that is not finite.

    Raises:
        ValueError: a weight cannot be written, would not be finite, or is what an adapter that goes on acting depends on;
            nothing has been written then.
    """
    _check_dependent(model, strengths)
    with acting_at(model, strengths):
        there = [(weight, weight.tensor) for weight in weights(model) if weight.effective_weight.active_updates()]
        for weight, tensor in there if check else ():
            if not torch.isfinite(weight.effective_weight.sum(tensor)).all():
                projection = weight.effective_weight.active_updates()[0].projection
                raise ValueError(f"{projection}: merged, the weight would not be finite in {tensor.dtype}")
        for weight, tensor in there:
            value = weight.effective_weight.sum(tensor)
            tensor.copy_(value)
            if not torch.equal(tensor.nan_to_num(), value.nan_to_num()):
                raise RuntimeError(f"{weight.path}: the weight was written and does not read back, so it is not where it seems")
