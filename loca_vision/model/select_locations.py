"""Choose the first locations of components by the gradient of a few losses before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from loca_vision.checks import check_choice
from loca_vision.functional.dct import dct2
from loca_vision.methods.adapter_config import generator_of
from loca_vision.methods.loca import LoCAConfig
from loca_vision.methods.locations import jittered
from loca_vision.methods.spectrum import Spectrum
from loca_vision.methods.update import Update
from loca_vision.model.activation import strengthen
from loca_vision.model.atomic import atomic
from loca_vision.model.state import AdapterState, refuse_fused, state_of
from loca_vision.model.traversal import sites, unwrap
from loca_vision.offload import stored

BUDGETS = ("projection", "model")
RULES = ("largest", "sampled")


class _Probe(Update):
    """A matrix of zeros in the place of an update, whose gradient is that of the weight."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        super().__init__(shape)
        self.matrix = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

    def delta(self, strength: float = 1.0, weight: Tensor | None = None) -> Tensor:
        return self.matrix * strength


def select_locations(
    model: nn.Module,
    losses: Iterable[Tensor],
    *,
    name: str = "default",
    budget: Literal["projection", "model"] = "projection",
    rule: Literal["largest", "sampled"] = "largest",
) -> dict[str, Tensor]:
    """Put the components of an adapter with `location_init="gradient"` where the gradient is large.

    Z = C G D^T is the spectrum of the gradient G of a projection's weight: an entry is the gradient that a coefficient in its
    cell would have. Z is summed over the losses of a few batches before anything is trained. The model's parameters and their
    gradients stay as they are. Each loss costs a forward and a backward pass, and meanwhile a float32 gradient of every adapted
    weight is held in memory. With torch.distributed, the gradients of all processes are added.

    Args:
        model: the model with the adapter active, in the mode in which it will be trained.
        losses: scalars, each computed when it is asked for: a generator, not a list.
        name: the adapter's name.
        budget: "projection" keeps each projection's number of components; "model" redistributes all of them, at least one to
            each projection. The latter creates new parameters: call it before creating an optimiser or a schedule.
        rule: "largest" takes the cells of the largest |sum of Z|. "sampled" draws different cells with probabilities in
            proportion to (sum of Z)^2, by the adapter's seed.

    Returns:
        (B, 2) int64 rows and columns by projection, on the CPU: from the largest on, or in the order in which they were drawn.

    Raises:
        ValueError: there is no such adapter; it has other settings, is inactive or has been trained; or there is no loss, or
            one that is not a finite scalar or does not depend on the adapter. The model is then unchanged.
    """
    check_choice("budget", budget, BUDGETS)
    check_choice("rule", rule, RULES)
    inner = unwrap(model)
    record = _record_of(inner, name)
    found = _spectra(inner, name)
    with atomic(inner):
        with _probed(inner, record, name) as probes:
            _accumulate(losses, list(probes.values()))
            sizes = {projection: dct2(_gradient(probe)).abs().flatten() for projection, probe in probes.items()}
        if rule == "sampled":
            seed = record.adapters[name].config.seed
            sizes = {projection: _perturbed(own, projection, seed) for projection, own in sizes.items()}
        chosen = _largest(sizes, {projection: update.count for projection, update in found.items()}, budget)
        for projection, flat in chosen.items():
            _place(found[projection], flat, projection, record.adapters[name].config.seed)
        if budget == "model":
            counts = {projection: len(flat) for projection, flat in chosen.items()}
            config = record.adapters[name].config
            assert isinstance(config, LoCAConfig)
            record.adapters[name].config = replace(config, n_components=counts)
        strengthen(inner, record)
    return {projection: _cells(flat, found[projection].shape).cpu() for projection, flat in chosen.items()}


def _record_of(model: nn.Module, name: str) -> AdapterState:
    """Return the model's record, or refuse an adapter whose components cannot be placed."""
    record = state_of(model)
    if record is None or name not in record.adapters:
        raise ValueError(f"name={name!r}: the model has no such adapter")
    refuse_fused(record, record.fused.adapters)
    init = getattr(record.adapters[name].config, "location_init", None)
    if init != "gradient":
        raise ValueError(f"adapter {name!r} has location_init={init!r}: expected one with LoCAConfig(location_init='gradient')")
    if name not in record.effective:
        raise ValueError(f"adapter {name!r} does not act: call set_adapters first")
    return record


def _spectra(model: nn.Module, name: str) -> dict[str, Spectrum]:
    found: dict[str, Spectrum] = {}
    for site in sites(model):
        for slot, update in site.updates.entries():
            if slot.adapter == name:
                assert isinstance(update, Spectrum)
                if stored(update, "coefficients").any():
                    raise ValueError(f"adapter {name!r} has been trained: the coefficients of {slot.projection} are not zero")
                found[slot.projection] = update
    return found


@contextmanager
def _probed(model: nn.Module, record: AdapterState, name: str) -> Iterator[dict[str, _Probe]]:
    """Replace the adapter's updates by probes inside the context, and freeze everything else."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    probes: dict[str, _Probe] = {}
    places = []
    for site in sites(model):
        for place, (slot, update) in enumerate(site.updates.entries()):
            if slot.adapter == name:
                probes[slot.projection] = _Probe(update.shape, stored(update, "coefficients").device)
                places.append((site.updates.updates, place, update, probes[slot.projection].train(update.training)))
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    for updates, place, _, probe in places:
        updates[place] = probe
    strengthen(model, record)
    try:
        yield probes
    finally:
        for updates, place, update, _ in places:
            updates[place] = update
        for parameter, learned in flags:
            parameter.requires_grad_(learned)
        strengthen(model, record)


def _accumulate(losses: Iterable[Tensor], probes: list[_Probe]) -> None:
    count = 0
    for count, loss in enumerate(losses, start=1):
        if not isinstance(loss, Tensor) or loss.shape != ():
            what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"type {type(loss).__name__}"
            raise ValueError(f"losses: number {count} has {what}: expected a scalar tensor")
        if not torch.isfinite(loss):
            raise ValueError(f"losses: number {count} is {float(loss.detach())}")
        if not loss.requires_grad:
            raise _independent()
        loss.backward()  # type: ignore[no-untyped-call]
    if not count:
        raise ValueError("losses: expected at least one, got none")
    if all(probe.matrix.grad is None for probe in probes):
        raise _independent()


def _independent() -> ValueError:
    return ValueError(
        "losses: they do not depend on the adapter; expected a generator, which computes a loss with the model when it is asked"
    )


def _gradient(probe: _Probe) -> Tensor:
    """Return the gradient, summed over all processes; zeros if no loss depends on the weight."""
    gradient = torch.zeros_like(probe.matrix) if probe.matrix.grad is None else probe.matrix.grad
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(gradient)
    if not torch.isfinite(gradient).all():
        raise ValueError("losses: a gradient is not finite; with float16, scale the losses")
    return gradient.detach()


def _perturbed(sizes: Tensor, projection: str, seed: int) -> Tensor:
    """Return scores whose largest are a sample without replacement, with probabilities in proportion to the squared sizes.

    They are logarithms with Gumbel noise (Efraimidis and Spirakis, 2006), on the CPU so that every device and process draws the
    same cells.
    """
    noise = torch.rand(len(sizes), dtype=torch.float64, generator=generator_of(seed, f"{projection}, cells"))
    return 2 * sizes.cpu().double().log() - noise.clamp(min=1e-300).log().neg().log()


def _largest(sizes: Mapping[str, Tensor], counts: Mapping[str, int], budget: str) -> dict[str, Tensor]:
    """Return the flat cells of each projection, from the largest on."""
    if budget == "projection":
        return {name: values.topk(counts[name]).indices for name, values in sizes.items()}
    total = sum(counts.values())
    best = {name: values.topk(min(total, len(values))) for name, values in sizes.items()}
    rest = torch.cat([found.values[1:].cpu() for found in best.values()])  # each has its first one
    of = torch.arange(len(best)).repeat_interleave(torch.tensor([len(found.values) - 1 for found in best.values()]))
    taken = of[rest.topk(total - len(best)).indices].bincount(minlength=len(best)) + 1
    return {name: found.indices[:number] for (name, found), number in zip(best.items(), taken.tolist(), strict=True)}


@torch.no_grad()
def _place(update: Spectrum, flat: Tensor, projection: str, seed: int) -> None:
    """Put the components at random points within these cells, as for random locations."""
    held: Any = stored(update, "locations")
    locations = jittered(flat.cpu(), update.shape, generator_of(seed, projection)).to(held.device)
    if len(locations) == len(held):
        held.copy_(locations)
    else:
        update.coefficients = nn.Parameter(locations.new_zeros(len(locations)), update.coefficients.requires_grad)
        update.locations = nn.Parameter(locations, update.locations.requires_grad)
        update.count = len(locations)
    update.awaited = False


def _cells(flat: Tensor, shape: tuple[int, int]) -> Tensor:
    return torch.stack([flat // shape[1], flat % shape[1]], 1)
