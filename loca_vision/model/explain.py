"""`explain`: show how each update is computed, why, and what that costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from loca_vision.checks import counts_by_name, is_whole
from loca_vision.functional.cosine_linear import workload_of
from loca_vision.functional.cost_model import Decision, Workload, builds_together, choose
from loca_vision.functional.flop_counts import (
    NOTHING,
    Work,
    of_applying,
    of_building,
    of_factors,
    of_sampled_gradient,
    of_whole_gradient,
)
from loca_vision.layers.projection_rows import projections_in
from loca_vision.messages import aligned
from loca_vision.methods.update import Update
from loca_vision.model.state import state_of
from loca_vision.model.traversal import Site, sites, unwrap

_HEADER = ("projection", "p x q", "B or r", "learns", "path", "forward", "MB", "backward", "MB", "why")


@dataclass(frozen=True)
class Explained:
    """One projection that an active adapter changes.

    Attributes:
        adapter, projection: the names of the adapter and the projection.
        shape: (p, q).
        count: B of a sparse spectrum, r of factors; None for other kinds of updates.
        learns: what is trained: "coefficients", "locations", both joined with "and", "factors", "numbers" for other kinds of
            updates, or "nothing".
        path: "applied" if no matrix is built; "sampled" or "whole" if one is, depending on how its gradient is computed;
            "together" if all matrices of one shape are built at once and their gradients computed at once; "factors" for two
            thin products instead of a matrix; "kept" for a matrix that is built once because nothing is trained.
        why: the reason for this path, in words.
        forward, backward: the work added to that of the frozen layer, for the given number of tokens.
    """

    adapter: str
    projection: str
    shape: tuple[int, int]
    count: int | None
    learns: str
    path: str
    why: str
    forward: Work
    backward: Work


@dataclass(frozen=True)
class Explanation:
    """The rows of an explanation, one per projection; it prints as a table with operations in millions and a total."""

    rows: tuple[Explained, ...]

    def __iter__(self) -> Iterator[Explained]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        ways = [[getattr(row, way) for row in self.rows] for way in ("forward", "backward")]
        total = f"{len(self.rows)} projections", *[""] * 4, *(cell for way in ways for cell in _cells(sum(way, NOTHING))), ""
        return aligned([_HEADER, *map(_line, self.rows), total], str.ljust)


def _line(row: Explained) -> tuple[str, ...]:
    size = f"{row.shape[0]} x {row.shape[1]}"
    about = row.projection, size, str(row.count or "-"), row.learns, row.path
    return *about, *_cells(row.forward), *_cells(row.backward), row.why


def _cells(work: Work) -> tuple[str, str]:
    return f"{work.flops / 1e6:,.0f} M", f"{work.bytes / 1e6:,.1f}"


def explain(model: nn.Module, tokens: int | Mapping[str, int] = 2048, *, dtype: torch.dtype | None = None) -> Explanation:
    """Explain how each adapted projection is computed now, why, and what it adds to the cost of the frozen layer.

    `print` the result for a table.

    Args:
        model: a model with adapters; the active ones are explained. Whatever has `requires_grad` now counts as trained.
        tokens: the number of vectors that a layer is called with, that is, batch size times positions: one number, or one for
            each name pattern (`"down_blocks.0.*"`, as in `fnmatch`), where the first pattern that matches decides.
        dtype: the dtype of the activations; by default that of each weight. Pass it if training runs under autocast.

    Returns:
        The rows, one for each adapted projection.

    Raises:
        ValueError: the model has no adapters, a count is below 1, or a projection matches no pattern.
    """
    if state_of(model) is None:
        raise ValueError("the model has no adapter to explain: inject or load one first")
    acting = [(site, _acting(site)) for site in sites(model)]
    names = [projection for _, updates in acting for _, projection, _ in updates]
    counts = counts_by_name(tokens, names, "tokens") if names else {}
    for name, count in counts.items():
        if not is_whole(count) or count < 1:
            raise ValueError(f"tokens={count!r} for {name}: a whole number from 1 up")
    weights = {known.projection: _weight(model, known.module) for known in projections_in(unwrap(model))}
    rows = [
        row
        for site, updates in acting
        if updates
        for row in _explained(site, updates, counts[updates[0][1]], weights[updates[0][1]], dtype)
    ]
    return Explanation(tuple(rows))


_Acting = tuple[str, str, Update]  # adapter, projection, update


def _acting(site: Site) -> list[_Acting]:
    strengths = site.updates.strengths
    entries = [(slot.adapter, slot.projection, update) for slot, update in site.updates.entries()]
    return [entry for entry in entries if entry[0] in strengths and not entry[2].inactive]


def _weight(model: nn.Module, module: str) -> Tensor:
    weight = unwrap(model).get_submodule(module)._parameters["weight"]
    assert weight is not None
    return weight


def _explained(site: Site, updates: list[_Acting], tokens: int, weight: Tensor, dtype: torch.dtype | None) -> list[Explained]:
    """Explain the projections of one weight, which share their activations."""
    learning = [update for *_, update in updates if update.learns()]
    if not learning:
        return [_still(one, site.updates.call_settings.low_memory) for one in updates]
    if all(update.factors() is not None for *_, update in updates):
        return [_by_factors(one, tokens) for one in updates]
    able = site.updates.can_be_built_together(weight)
    if able and builds_together(weight.device):
        return [_together(one, tokens) for one in updates]
    obstacle = _obstacle(learning, weight)
    choices = [Decision("whole")] * len(learning)
    if obstacle is None:
        choices = choose([_asked(update) for update in learning], tokens, weight.device, dtype or weight.dtype)
    if any(choice.strategy == "together" for choice in choices):
        if able:
            return [_together(one, tokens, _comparison(choices[0])) for one in updates]
        choices = [replace(choice, strategy="whole") for choice in choices]
    choice_of = {id(update): choice for update, choice in zip(learning, choices, strict=True)}
    sharing = sum(choice.strategy != "whole" for choice in choices)
    return [
        _by_matrix(one, choice_of.get(id(one[2])), tokens, sharing, obstacle or f"no costs are known for {weight.device.type}")
        for one in updates
    ]


def _obstacle(learning: list[Update], weight: Tensor) -> str | None:
    """Return the reason why there is only one way to compute the updates, or None if there is a choice."""
    if weight.requires_grad:
        return "W itself learns"
    if any(update.cosines() is None for update in learning):
        return "a kind of update that has no other way learns on this weight"
    return None


def _still(one: _Acting, low_memory: bool) -> Explained:
    if low_memory:
        return _row(one, "nothing", "applied", "nothing learns, and memory is spared: no matrix is built")
    return _row(one, "nothing", "kept", "nothing learns: W + Delta W is built once")


def _by_factors(one: _Acting, tokens: int) -> Explained:
    rank = _count(one[2]) or 0
    works = [of_factors(one[2].shape, rank, tokens, passes) for passes in (1, 2)]
    return _row(one, "factors", "factors", "two thin products instead of a matrix", *works)


def _together(one: _Acting, tokens: int, why: str = "") -> Explained:
    """Explain an update that is built together with others; shared launches do not save operations, so the work is the same."""
    why = why or "all weights of this shape are built at once, by a few large products"
    alone = _by_matrix(one, Decision("whole") if one[2].learns() else None, tokens, 0, "")
    return replace(alone, path="together", why=why)


def _by_matrix(one: _Acting, choice: Decision | None, tokens: int, sharing: int, otherwise: str) -> Explained:
    """Explain an update that is not of low rank in a training step, trained itself or next to one that is."""
    update = one[2]
    forward = of_building(update.shape, _count(update) or math.prod(update.shape))
    if choice is None:
        return _row(one, "nothing", "whole", "another update of this weight learns", forward)
    asked, why = _asked(update), _comparison(choice) or otherwise
    if choice.strategy == "whole":
        return _row(one, _learned(update), "whole", why, forward, of_whole_gradient(asked, tokens))
    backward = of_sampled_gradient(asked, tokens, sharing)
    if choice.strategy == "applied":
        applied = of_applying(asked, tokens, sharing)
        forward, backward = applied, backward + applied
    return _row(one, _learned(update), choice.strategy, why, forward, backward)


def _comparison(choice: Decision) -> str:
    known = ", ".join(f"{way} {1e3 * seconds:.2f} ms" for way, seconds in choice.seconds.items())
    return known and f"{known}, by the model"


def _asked(update: Update) -> Workload:
    cosines = update.cosines()
    return Workload(update.shape, _count(update) or 0, 1) if cosines is None else workload_of(cosines)


def _learned(update: Update) -> str:
    cosines = update.cosines()
    if cosines is None:
        return "numbers"
    halves = {"coefficients": cosines.coefficients, "locations": cosines.locations}
    return " and ".join(name for name, half in halves.items() if half.requires_grad)


def _count(update: Update) -> int | None:
    pair = update.factors()
    if pair is not None:
        return pair[0].shape[1]
    coefficients = getattr(update, "coefficients", None)
    return None if coefficients is None else len(coefficients)


def _row(one: _Acting, learns: str, path: str, why: str, forward: Work = NOTHING, backward: Work = NOTHING) -> Explained:
    adapter, projection, update = one
    return Explained(adapter, projection, update.shape, _count(update), learns, path, why, forward, backward)
