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
        path, layer: the linear layer, and its path.
        effective_weight: W + Delta W of the layer.
        stack: for a projection that fuses several layers, the paths of the layers whose weights it stacks.
    """

    path: str
    layer: nn.Module
    effective_weight: EffectiveWeight
    stack: tuple[str, ...] = ()

    @property
    def tensor(self) -> Tensor:
        """W (p, q) for reading and writing in place, even if it is offloaded.

        Raises:
            ValueError: the weight is not a floating-point matrix.
        """
        weight = as_matrix(stored(self.layer, "weight") if "weight" in self.layer._parameters else None)
        if weight is None:
            kind = type(self.layer).__name__
            raise ValueError(f"{self.path} is a {kind} without a plain floating-point weight: nothing can be written into it")
        return weight


def weights(model: nn.Module) -> list[Weight]:
    """Return every weight that adapters have updates for, active or not; for fused projections, the parts and the stack."""
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
    """Return what a stack of weights should be: the concatenation of the current weights of its parts."""
    layers = [base_of(unwrap(model).get_submodule(path)) for path in weight.stack]
    return torch.cat([stored(layer, "weight").to(weight.tensor.device) for layer in layers])


@contextmanager
def acting_at(model: nn.Module, strengths: Mapping[str, Strength]) -> Iterator[None]:
    """Make exactly these adapters act, at these strengths, inside the context."""
    before = [(site.updates, site.updates.strengths) for site in sites(model)]
    try:
        for site in sites(model):
            site.updates.strengths = strengths_at(site.updates, strengths)
        yield
    finally:
        for updates, acting in before:
            updates.strengths = acting


def _check_dependent(model: nn.Module, written: Collection[str]) -> None:
    """Raise ValueError if writing these adapters would change a weight that another active adapter depends on.

    A weight-decomposed adapter changes W as it was when the adapter was added, not W with another adapter merged into it.
    """
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
    """Write W + the updates of these adapters, at these strengths, into every weight they have updates for.

    Args:
        model: the model.
        strengths: the adapters, and how strongly each acts.
        check: whether to build every weight before the first is written, and refuse one that is not finite.

    Raises:
        ValueError: a weight cannot be written, would not be finite, or is one that another active adapter depends on; in
            that case, nothing has been written.
        RuntimeError: a weight was written but does not read back.
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
