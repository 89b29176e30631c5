"""Several adapters in one batch, where every sample has its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.checks import finite_number
from loca_vision.layers.mixtures import HeldAdapter, Mixture, mixing, mixture_of
from loca_vision.model.adapter_sources import held_adapters
from loca_vision.model.mixed_parts import mixtures_of
from loca_vision.model.traversal import unwrap
from loca_vision.model.whole_per_sample import suppliers

Name = str | Mapping[str, float] | None


@contextmanager
def per_sample(model: nn.Module, names: Sequence[Name]) -> Iterator[None]:
    """Give every sample of a batch its own adapters inside the context, whatever `set_adapters` says.

    This affects only the current thread or task.

    Example::

        with per_sample(model, ["shop-a", "shop-b", None, {"ink": 0.7, "cartoon": 0.3}]):
            logits = model(images)  # four of them

    Spectra share the transforms of the activations, so a batch costs the same with one adapter as with thirty. Trained heads
    belong to their adapters, as with `set_adapters`; heads of different sizes cannot form one output, see `head_logits`. Each
    adapter gets gradients from its own samples. A compiled model is recompiled at the first such call, but not for other
    names.

    Args:
        model: a model with adapters, or with an `AdapterStore`. The batch is the first axis of its first tensor.
        names: one entry for each sample: the name of an adapter, None for the base model, or a mapping from names to weights.

    Raises:
        ValueError: a name is unknown, a weight is not finite, or an adapter is fused. A call of the model inside the context
            raises it if the batch has another size.
        TypeError: `model` is not a module or is a `DataParallel`, or an entry has the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}: expected a module; a pipeline takes loca_adapters=[...] when it is called"
        )
    if isinstance(model, nn.DataParallel):
        raise TypeError("model is a DataParallel, whose threads do not know the call's adapters: use DistributedDataParallel")
    entries = checked_entries(names)
    with mixing(mixtures_for(unwrap(model), entries, held_adapters(model, names_in(entries)))):
        yield


def head_logits(model: Any, features: Tensor, names: Sequence[Name]) -> list[Tensor]:
    """Return the logits of every sample from its own adapter's head, which may have its own number of classes.

    Args:
        model: a timm model with adapters.
        features: (M, ...) from `model.forward_features`, called inside `per_sample(model, names)`. If `head_logits` is called
            inside the same context, it uses the very adapters that computed the features, even if a store's files have
            changed since.
        names: as in `per_sample`.

    Returns:
        A list of M tensors (C,), where C is the number of classes of the sample's head.

    Raises:
        ValueError: as in `per_sample`, or there are not as many names as samples.
        TypeError: the model has no `forward_head`.
    """
    forward_head: Any = getattr(unwrap(model), "forward_head", None)
    if forward_head is None:
        raise TypeError(f"model is a {type(model).__name__}: expected a timm model, which has a forward_head")
    if len(names) != len(features):
        raise ValueError(f"names has {len(names)} entries for features of {len(features)} samples")
    entries = checked_entries(names)
    held = _held_by_call(model, entries)
    groups: dict[Any, list[int]] = {}
    for index, supplier in enumerate(suppliers(entries, held)):
        groups.setdefault(supplier, []).append(index)
    found: dict[int, Tensor] = {}
    for samples in groups.values():
        with mixing(mixtures_for(unwrap(model), [entries[index] for index in samples], held)):
            logits = forward_head(features[torch.tensor(samples, device=features.device)])
        found |= dict(zip(samples, logits, strict=True))
    return [found[index] for index in range(len(features))]


def _held_by_call(model: nn.Module, entries: Sequence[Mapping[str, float]]) -> dict[str, HeldAdapter]:
    """Return the adapters of the surrounding context if it has all these names, because a store may hold others by now."""
    around = mixture_of(unwrap(model))
    there = {} if around is None else {adapter.name: adapter for entry in around.entries for adapter, _ in entry}
    names = names_in(entries)
    return {name: there[name] for name in names} if there.keys() >= set(names) else held_adapters(model, names)


def checked_entries(names: Sequence[Name]) -> list[dict[str, float]]:
    """Return each entry as a mapping from names to weights.

    Raises:
        TypeError: `names` or one of its entries has the wrong type.
        ValueError: a weight is not finite, or there is no entry.
    """
    if isinstance(names, (str, Mapping)) or not isinstance(names, Sequence):
        raise TypeError(f"names is a {type(names).__name__}: expected a list with one entry for each sample")
    if not names:
        raise ValueError("names=[]: expected one entry for each sample")
    return [_entry(entry, f"names[{index}]") for index, entry in enumerate(names)]


def _entry(entry: Any, place: str) -> dict[str, float]:
    if entry is None or isinstance(entry, str):
        return {} if entry is None else {entry: 1.0}
    if not isinstance(entry, Mapping) or not all(isinstance(name, str) for name in entry):
        raise TypeError(f"{place}={entry!r}: expected the name of an adapter, None, or a mapping from names to weights")
    return {name: finite_number(weight, f"{place}[{name!r}]") for name, weight in entry.items()}


def names_in(entries: Sequence[Mapping[str, float]]) -> list[str]:
    """Return all names, each once."""
    return list(dict.fromkeys(name for entry in entries for name in entry))


def mixtures_for(
    model: nn.Module, entries: Sequence[Mapping[str, float]], held: Mapping[str, HeldAdapter], expand: Any = None
) -> dict[int, Mixture]:
    """Return the mixture of every part of the model that takes part in the call, by handle.

    Raises:
        ValueError: an adapter is fused into the weights, or trains a tensor that only one adapter at a time can supply.
    """
    mixture = Mixture([tuple((held[name], weight) for name, weight in entry.items()) for entry in entries], expand)
    return mixtures_of(model, mixture)
