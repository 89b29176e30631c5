"""List, activate, weight, disable and rename the adapters of a model, and print what is trained."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from loca_vision.checks import as_number
from loca_vision.model.activation import activate, trainable_updates
from loca_vision.model.atomic import atomic
from loca_vision.model.state import AdapterState, Strength, refuse_fused, state_of
from loca_vision.model.target_checks import check_new_name
from loca_vision.model.traversal import sites, unwrap
from loca_vision.model.whole_tensors import trained_whole


def adapters(model: nn.Module, name: str = "default") -> dict[str, Any]:
    """Return the updates of one adapter by projection, in the order of the model's modules; with LoCA, each is a `Spectrum`.

    Raises:
        ValueError: the model has no such adapter.
    """
    _known(_record(model), name)
    entries = (entry for site in sites(model) for entry in site.updates.entries())
    return {slot.projection: update for slot, update in entries if slot.adapter == name}


def set_adapters(
    model: nn.Module, names: str | Sequence[str], weights: float | Sequence[float] | Mapping[str, float] | None = None
) -> None:
    """Activate exactly these adapters with these weights (1.0 each by default). An empty sequence selects the base model.

    Tensors trained as a whole (a classifier head) come from the last of the named adapters that has any.

    Raises:
        ValueError: a name is unknown or repeated, a weight is not finite, or there are not as many weights as names.
    """
    record = _record(model)
    if isinstance(names, Mapping):
        raise ValueError(f"names={dict(names)!r}: expected a sequence of names; their weights are the next argument")
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        _known(record, name)
    if len(set(names)) < len(names):
        raise ValueError(f"names={names!r}: an adapter is named twice")
    refuse_fused(record, names or record.fused.adapters)  # the base model is not available then
    strengths: list[Strength] = [*_strengths(names, weights)]
    activate(unwrap(model), record, dict(zip(names, strengths, strict=True)), enabled=True)


def _strengths(names: list[str], weights: Any) -> list[float]:
    """Return one finite number for each name, whichever form the weights were passed in."""
    if weights is None or _is_single(weights):
        weights = [1.0 if weights is None else weights] * len(names)
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise ValueError(f"weights={dict(weights)!r}: expected one weight for each of {names!r}")
        weights = [weights[name] for name in names]
    if len(weights) != len(names):
        raise ValueError(f"weights={list(weights)!r}: {len(weights)} weights for {len(names)} adapters")
    numbers = [as_number(weight) for weight in weights]
    if None in numbers:
        raise ValueError(f"weights={list(weights)!r}: expected a finite number")
    return numbers  # type: ignore[return-value]


def _is_single(weights: Any) -> bool:
    return isinstance(weights, str) or not hasattr(weights, "__len__") or getattr(weights, "shape", None) == ()


def active_adapters(model: nn.Module) -> dict[str, Strength]:
    """Return the active adapters and their strengths, each a number or a number per projection; empty if there are none."""
    record = state_of(model)
    return dict(record.active) if record else {}


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Disable all adapters inside the context: the model is the base, with its own head. Afterwards they act as before.

    This provides the reference for self-distillation or a preference loss: `with disable_adapter(model), torch.no_grad(): ...`.
    It may be entered between a forward pass and its backward pass.

    Raises:
        ValueError: the model has no adapter, or one is fused into the weights.
    """
    record = _record(model)
    refuse_fused(record, record.fused.adapters)
    before = record.enabled
    activate(unwrap(model), record, record.active, enabled=False)
    try:
        yield
    finally:
        if state_of(model) is record:
            activate(unwrap(model), record, record.active, enabled=before)


def rename_adapter(model: nn.Module, name: str, new: str) -> None:
    """Rename an adapter; its trained values, its weight and whether it is active do not change.

    Raises:
        ValueError: there is no such adapter, or the new name is in use or not made of letters, digits, '_' and '-'.
    """
    record = _record(model)
    _known(record, name)
    if new == name:
        return
    check_new_name(model, new)
    with atomic(unwrap(model)):
        for values in (record.adapters, record.active, record.fused.adapters):
            items = [(new if key == name else key, value) for key, value in values.items()]
            values.clear()
            values.update(items)  # type: ignore[arg-type]
        for site in sites(model):
            site.updates.rename(name, new)


def print_trainable_parameters(model: nn.Module) -> None:
    """Print the number of trainable parameters by kind, as peft does, for the active adapters and for heads.

    Spectra count with both coefficients and locations, whichever of them the schedule moves now.

    Raises:
        ValueError: the model has no trainable adapter.
    """
    learned = trainable_updates(model)
    record = _record(model)
    counts = {
        "coefficients": sum(p.numel() for update in learned for p in update.trainable()),
        "locations": sum(p.numel() for update in learned for p in update.location_parameters()),
        "head": sum(p.numel() for p in trained_whole(unwrap(model), record)),
    }
    trained, total = sum(counts.values()), sum(p.numel() for p in model.parameters())
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count)
    print(f"trainable params: {trained:,} ({kinds}) || all params: {total:,} || trainable%: {100 * trained / total:.4f}")


def _record(model: nn.Module) -> AdapterState:
    record = state_of(model)
    if record is None:
        raise ValueError(f"{type(unwrap(model)).__name__} has no adapter; inject or load one first")
    return record


def _known(record: AdapterState, name: str) -> str:
    if name not in record.adapters:
        raise ValueError(f"no adapter {name!r} in the model; it has {', '.join(map(repr, record.adapters))}")
    return name
