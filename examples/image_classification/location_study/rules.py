"""Rules that choose cells: each gives every cell of a projection a score, and those of the largest scores are taken."""

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
    """
    Args:
        score: (p, q).
        whole: whether all projections share one budget: the largest scores of all of them are taken, one of each at least.
        about: for tables.
    """

    score: Score
    about: str
    whole: bool = False

    def flags(self, budget: int, steps: int) -> list[str]:
        """For train.py."""
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
    """The second moment of rank one with the same sums of rows and columns, as in Adafactor."""
    rows, cols = of.squares.sum(1), of.squares.sum(0)
    return of.total.abs() / (rows[:, None] * cols / of.squares.sum()).sqrt().clamp(min=1e-30)


def _sampled(power: float) -> Score:
    """Without replacement: the largest of log-probabilities with Gumbel noise (Efraimidis and Spirakis, 2006)."""

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
    """What a file of the rule holds for a seed: flat cells row * q + column by projection, and other parts by `<name>.<part>`.

    Of cells there are `budget` each on average; without `rule.whole`, exactly.

    Raises:
        ValueError: a projection has fewer cells than that.
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
    """Of the squared norm of the gradients, summed over the batches: what lies in what was chosen."""
    every = sum(float(of.total.square().sum()) for of in spectra.values())
    names = (CELLS, "rows", "columns", "left", "right")
    parts = {name: {part: found[_key(name, part)] for part in names if _key(name, part) in found} for name in spectra}
    return sum(energy(of, parts[name]) for name, of in spectra.items()) / every
