"""The arms of a study of classifiers: methods at budgets, with the rates to try."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from classifier_study.settings import Study
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.registry import KINDS
from loca_vision.recipes.classification.recipe_groups import METHODS

WIDTH = 384  # of the projections, which are square
TUNED_AT = 3072  # the number of components that the grids of rates were made for
_BY_RANK = "r"  # the name of a configuration's field for the rank


@dataclass(frozen=True)
class Arm:
    """One method at one budget.

    Args:
        name: the arm's name in tables and folders.
        rates: the grid of rates, from small to large; it is extended if the best rate is at an end.
        flags: the flags for train.py.
        tuned: the flag that sets the rate.
    """

    name: str
    rates: tuple[float, ...]
    flags: tuple[str, ...]
    tuned: str = "--lr"


def arms(study: Study) -> list[Arm]:
    """Return all arms of the study: the linear probe, full training, then the adapter methods."""
    probe = ("--method", "lp", *(["--cache_features"] if study.cache_features else []))
    found = [
        Arm("lp", (3e-3, 1e-2, 3e-2), probe, "--head_lr"),
        Arm("full", (1e-5, 3e-5, 1e-4), ("--method", "full", "--head_lr", "1e-3")),
    ]
    for config in KINDS.values():
        if not study.methods or config.method in study.methods:
            found += _arms_of(study, config)
    return found


def _arms_of(study: Study, config: type[AdapterConfig]) -> Iterator[Arm]:
    """Yield a method once for each distinct size, or just once if it has no size to choose.

    A method that moves its locations also gets arms with fixed locations.
    """
    for budget, chosen in _sizes(study, config).items():
        name = f"{{}}-{budget}" if chosen else "{}"
        flags = ["--method", config.method, *study.adapter_flags]
        for field, value in chosen.items():
            flags += [f"--{METHODS.flags[field]}", str(value)] if field in METHODS.flags else ["--set", f"{field}={value}"]
        flags += ["--head_lr", f"{config.head_lr:g}"]
        rates = rates_of(config, chosen)
        if not config.moves_locations:
            yield Arm(name.format(config.method), rates, tuple(flags))
            continue
        for suffix, steps in (("", study.learning_steps), ("-fixed", 0)):
            yield Arm(name.format(config.method + suffix), rates, (*flags, "--learning_steps", str(steps)))


def _sizes(study: Study, config: type[AdapterConfig]) -> dict[int, dict[str, Any]]:
    """Return the settings of a method by the number of trained numbers per projection."""
    shape = (WIDTH, WIDTH)
    largest = config.at_budget(sum(shape), shape)
    if not largest:
        return {0: {}}
    if _BY_RANK not in largest:
        return {budget: config.at_budget(budget, shape) for budget in study.budgets}
    wanted = [rank * sum(shape) for rank in study.ranks] or study.budgets
    found = {budget // sum(shape) * sum(shape): config.at_budget(budget, shape) for budget in wanted}
    return {budget: chosen for budget, chosen in found.items() if budget}


def rates_of(config: type[AdapterConfig], chosen: dict[str, Any]) -> tuple[float, ...]:
    """Return the method's grid of rates.

    If the method has a number of components, the rates are scaled so that steps in weight space have the same length at every
    budget.
    """
    rates: Sequence[float] = config.lr_grid or (config.lr / 10, 0.3 * config.lr, config.lr)
    longer = math.sqrt(TUNED_AT / chosen["n_components"]) if "n_components" in chosen else 1.0
    return tuple(float(f"{rate * longer:.2g}") for rate in rates)
