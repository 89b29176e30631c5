"""Do learned locations form a pattern? Three tests against chance, with moves of the same lengths and the same coefficients.

- frequency: are the components on average closer to low frequencies (or farther from them) than after moves in random
  directions?
- neighbours: are the components closer to each other (or farther apart) than after such moves?
- energy: are the large coefficients at lower (or higher) frequencies than the small ones?

A frequency is the mean of row / (p - 1) and column / (q - 1): 0.5 on average over all cells. For the first two tests, every
component is moved as far from its start as it really was, with random signs for rows and columns, and reflected at borders;
components that a border has stopped are left out, since the border itself gathers them. For the third test, coefficients are
permuted within each projection. All three tests treat components as independent, but layers of one run share batches, so
p-values tend to be too small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.spatial import KDTree

from location_moves import Array, Cells, Moves


def frequencies(cells: Cells, shape: tuple[int, int]) -> Array:
    """Return the frequencies (B,), from 0 to 1, of cells (B, 2)."""
    return np.asarray((cells / (np.array(shape) - 1)).mean(1))


def neighbour_distances(cells: Cells) -> Array:
    """Return the distance (B,) in cells from each of two or more cells (B, 2) to its nearest neighbour; 0 if shared."""
    distances, _ = KDTree(cells).query(cells, 2)
    return np.asarray(distances[:, 1])


def in_random_directions(moves: Moves, random: np.random.Generator) -> Cells:
    """Return cells (B, 2) as far from the start as the components, with random signs per axis, reflected at borders."""
    lengths, last = np.abs(moves.end - moves.start), np.array(moves.shape) - 1
    cells = moves.start + lengths * random.choice((-1, 1), lengths.shape)
    cells = np.where(cells < 0, -1 - cells, cells)  # at the border itself, half a cell away, so uniform cells stay uniform
    return np.asarray(np.where(cells > last, 2 * last + 1 - cells, cells))


def p_value(observed: float, simulated: Array) -> float:
    """Return the two-sided p-value: how often simulations are as far from their mean, counting the observation itself."""
    middle = simulated.mean()
    return float((1 + (np.abs(simulated - middle) >= abs(observed - middle)).sum()) / (1 + len(simulated)))


def patterns(runs: Sequence[Sequence[Moves]], simulations: int, seed: int) -> dict[str, dict[str, float]]:
    """Run the three tests over all projections of all runs: `observed`, `by_chance` (the simulations' mean) and `p_value`."""
    every = [moves for run in runs for moves in run]
    free = [_without_stopped(moves) for moves in every]
    random = np.random.default_rng(seed)
    return {
        "frequency": _tested(free, simulations, random, lambda moves, cells: frequencies(cells, moves.shape)),
        "neighbours": _tested(free, simulations, random, lambda moves, cells: neighbour_distances(cells)),
        "energy": _energy(every, simulations, random),
    }


def _without_stopped(moves: Moves) -> Moves:
    free = ~moves.at_border
    return Moves(moves.name, moves.shape, moves.start[free], moves.end[free], moves.coefficients[free])


def _tested(
    every: Sequence[Moves], simulations: int, random: np.random.Generator, measure: Callable[[Moves, Cells], Array]
) -> dict[str, float]:
    """Compare the mean of a measure over all components with its means for random directions."""

    def mean(cells: Callable[[Moves], Cells]) -> float:
        return float(np.concatenate([measure(moves, cells(moves)) for moves in every]).mean())

    observed = mean(lambda moves: moves.end)
    simulated = np.array([mean(lambda moves: in_random_directions(moves, random)) for _ in range(simulations)])
    return _told(observed, simulated)


def _energy(every: Sequence[Moves], simulations: int, random: np.random.Generator) -> dict[str, float]:
    """Compare the mean over projections of the frequency weighted by squared coefficients with permuted coefficients."""
    pairs = [(frequencies(moves.end, moves.shape), moves.coefficients**2) for moves in every]

    def mean(arranged: Callable[[Array], Array]) -> float:
        return float(np.mean([np.average(places, weights=arranged(energies)) for places, energies in pairs]))

    observed = mean(lambda energies: energies)
    return _told(observed, np.array([mean(random.permutation) for _ in range(simulations)]))


def _told(observed: float, simulated: Array) -> dict[str, Any]:
    return {
        "observed": round(observed, 5),
        "by_chance": round(float(simulated.mean()), 5),
        "deviation_by_chance": round(float(simulated.std()), 5),
        "p_value": round(p_value(observed, simulated), 4),
    }
