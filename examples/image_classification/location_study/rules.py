"""Rules that choose cells: each scores every cell of a projection, and the cells with the largest scores are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loca_vision.methods.adapter_config import generator_of
from location_study.chosen_cells import ChosenCellsConfig
from location_study.gradient_spectra import GradientSpectrum
from location_study.informed_rules import CELLS, INFORMED, InformedRule, energy

Score = Callable[[GradientSpectrum, torch.Generator], Tensor]


@dataclass(frozen=True)
class Rule:
    """A rule that scores cells.

    Args:
        score: a function that returns the scores (p, q) of a projection.
        whole: whether all projections share one budget: the largest scores over all of them are taken, at least one of each.
        about: the description in tables.
    """

    score: Score
    about: str
    whole: bool = False

    def flags(self, budget: int, steps: int) -> list[str]:
        """Return the flags for train.py."""
        return ["--method", ChosenCellsConfig.method]


def _random(of: GradientSpectrum, draws: torch.Generator) -> Tensor:
    return torch.rand(of.total.shape, generator=draws)


def _low(of: GradientSpectrum, draws: torch.Generator) -> Tensor:
    rows, cols = (torch.arange(size, dtype=torch.float32) for size in of.total.shape)
    return -(rows[:, None].square() + cols.square())


def _gradient(of: GradientSpectrum, draws: torch.Generator) -> Tensor:
    return of.total.abs()


def _squares(of: GradientSpectrum, draws: torch.Generator) -> Tensor:
    return of.squares


def _deviation(of: GradientSpectrum, draws: torch.Generator) -> Tensor:
    return of.total.abs() / of.squares.sqrt().clamp(min=1e-30)


def _curvature(of: GradientSpectrum, draws: torch.Generator) -> Tensor:
    """Divide by the root of the rank-one second moment with the same row and column sums, as in Adafactor."""
    rows, cols = of.squares.sum(1), of.squares.sum(0)
    return of.total.abs() / (rows[:, None] * cols / of.squares.sum()).sqrt().clamp(min=1e-30)


def _sampled(power: float) -> Score:
    """Return a score that samples without replacement: log-probabilities plus Gumbel noise (Efraimidis and Spirakis, 2006)."""

    def score(of: GradientSpectrum, draws: torch.Generator) -> Tensor:
        uniform = torch.rand(of.total.shape, generator=draws, dtype=torch.float64).clamp(min=1e-300)
        return power * of.total.abs().double().clamp(min=1e-300).log() - (-uniform.log()).log()

    return score


RULES: dict[str, Rule | InformedRule] = {
    "random": Rule(_random, "any cell as likely as any other"),
    "low": Rule(_low, "the lowest frequencies"),
    "gradient": Rule(_gradient, "largest abs(sum Z)"),
    "sampled-1": Rule(_sampled(1.0), "drawn with probability ~ abs(sum Z)"),
    "sampled-2": Rule(_sampled(2.0), "drawn with probability ~ (sum Z)^2"),
    "squares": Rule(_squares, "largest sum Z^2"),
    "deviation": Rule(_deviation, "largest abs(sum Z) / sqrt(sum Z^2)"),
    "curvature": Rule(_curvature, "largest abs(sum Z) over the root of its factored second moment"),
    "gradient-model": Rule(_gradient, "largest abs(sum Z) of all projections together", whole=True),
    "squares-model": Rule(_squares, "largest sum Z^2 of all projections together", whole=True),
    **INFORMED,
}


def chosen(rule: Rule | InformedRule, spectra: Mapping[str, GradientSpectrum], budget: int, seed: int) -> dict[str, Tensor]:
    """Return the contents of a rule's file for a seed.

    Flat cells row * q + column are stored under the projection's name, and other parts under `<name>.<part>`. A scoring rule
    takes exactly `budget` cells per projection, or `budget` on average with `rule.whole`.

    Raises:
        ValueError: a projection has fewer than `budget` cells.
    """
    for name, of in spectra.items():
        if budget > of.total.numel():
            raise ValueError(f"budgets={budget}: {name} has {of.total.numel()} cells")
    if isinstance(rule, Rule):
        return _cells(rule, spectra, budget, seed)
    parts = {name: rule.parts(of, budget, generator_of(seed, name)) for name, of in spectra.items()}
    return {_key(name, part): value.contiguous() for name, own in parts.items() for part, value in own.items()}


def _key(name: str, part: str) -> str:
    return name if part == CELLS else f"{name}.{part}"


def _cells(rule: Rule, spectra: Mapping[str, GradientSpectrum], budget: int, seed: int) -> dict[str, Tensor]:
    scores = {name: rule.score(of, generator_of(seed, name)).flatten().clone() for name, of in spectra.items()}
    if not rule.whole:
        return {name: own.topk(budget).indices for name, own in scores.items()}
    first = {name: own.argmax() for name, own in scores.items()}
    for name, own in scores.items():
        own[first[name]] = torch.inf
    best = torch.cat([*scores.values()]).topk(budget * len(scores)).indices
    ends = torch.tensor([len(own) for own in scores.values()]).cumsum(0)
    which = torch.bucketize(best, ends, right=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1]])
    return {name: (best - starts[number])[which == number] for number, name in enumerate(scores)}


def energy_share(spectra: Mapping[str, GradientSpectrum], found: Mapping[str, Tensor]) -> float:
    """Return the share of the squared norm of the gradients, summed over the batches, that lies in the chosen parts."""
    every = sum(float(of.total.square().sum()) for of in spectra.values())
    names = (CELLS, "rows", "columns", "left", "right")
    parts = {name: {part: found[_key(name, part)] for part in names if _key(name, part) in found} for name in spectra}
    return sum(energy(of, parts[name]) for name, of in spectra.items()) / every
