"""Find the sites, updates and tensors of a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from loca_vision.layers.adapted_attention import AdaptedAttention
from loca_vision.layers.adapted_linear import AdaptedLayer
from loca_vision.layers.targets import canonical
from loca_vision.layers.weight_updates import AdapterSlot, WeightUpdates
from loca_vision.methods.update import Update


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of `torch.compile`, data parallelism and timm's `features_only` for ViTs."""
    while True:
        inner: Any = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        if inner is None and type(model).__name__ == "FeatureGetterNet":
            inner = model._modules.get("model")
        if not isinstance(inner, nn.Module):
            return model
        model = inner


@dataclass(frozen=True)
class Site:
    """The updates of one weight, and the layer whose class was replaced for them."""

    updates: WeightUpdates
    host: AdaptedLayer | AdaptedAttention


def modules_of(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the same as `model.modules()` in the same order, in a third of the time because no names are built."""
    waiting: list[nn.Module | None] = [unwrap(model)]
    seen: set[int] = set()
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in seen:
            seen.add(id(module))
            yield module
            waiting.extend(reversed(module._modules.values()))


def sites(model: nn.Module) -> list[Site]:
    """Return the sites of updates, in the order of the model's modules."""
    found: list[Site] = []
    for module in modules_of(model):
        if isinstance(module, AdaptedLayer):
            found.append(Site(module.loca, module))
        elif isinstance(module, AdaptedAttention):
            found += [Site(updates, module) for updates in module.loca.parts()]
    return found


def slots(model: nn.Module) -> list[AdapterSlot]:
    """Return every adapted projection of every adapter."""
    return [slot for site in sites(model) for slot in site.updates.slots]


def all_updates(model: nn.Module) -> list[Update]:
    """Return every update of every adapter of the model."""
    return [module for module in modules_of(model) if isinstance(module, Update)]


def learns(model: nn.Module) -> bool:
    """Whether any adapter is meant to be trained, even if a schedule has frozen all of it for now."""
    return any(update.is_trained() for update in all_updates(model))


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the model's parameters without those of its adapters, by canonical name."""
    inside = {id(p) for update in all_updates(model) for part in modules_of(update) for p in part._parameters.values()}
    return {canonical(name): p for name, p in model.named_parameters() if id(p) not in inside}


def own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return `own_parameters` and the running statistics of batch normalisation, which training changes without a gradient."""
    norms = {path: module for path, module in model.named_modules() if isinstance(module, _BatchNorm)}
    statistics = {
        canonical(f"{path}.{name}"): buffer
        for path, norm in norms.items()
        for name, buffer in norm.named_buffers(recurse=False)
    }
    return {**own_parameters(model), **statistics}


def moved_by_training(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return those of a model's own tensors that training changes: trainable parameters and running statistics."""
    return {name: t for name, t in tensors.items() if t.requires_grad or not isinstance(t, nn.Parameter)}
