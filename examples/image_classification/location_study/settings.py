"""What the study of location rules is made of."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from classifier_study.settings import Study
from loca_vision.checks import check_choice, check_count
from location_study.rules import RULES

_Hidden: Any = tyro.conf.Suppress  # settings of the other study that mean nothing here


@dataclass(frozen=True)
class RuleStudy(Study):
    """Where should the components of a cosine spectrum stand? Rules that choose cells, at equal numbers, rates and steps."""

    dataset: Literal["cifar10", "cifar100", "fashion_mnist", "digits", "folder", "eurosat", "dtd", "oxford_pets"] = "folder"
    """Which images."""
    output_dir: Path = Path("location-rules")
    """Where every run has a folder, and runs.json, study.md and study.png go."""
    rules: tuple[str, ...] = tuple(RULES)
    """What is compared."""
    budgets: tuple[int, ...] = (30, 300)
    """Components of each projection."""
    layers: tuple[str, ...] = ("blocks.[6-9]", "blocks.1?")
    """Name patterns of the layers whose query and value are adapted, all of whole blocks."""
    location_batches: int = 16
    """Batches of training images whose gradient the rules see; no rule is charged for them."""
    head: Literal["probe", "new"] = "probe"
    """The classifier head with which gradients are computed: one that a linear probe has learned, or the run's own new one."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Runs at the best rate. Rates are tuned with the first."""
    image_size: int = 42
    """Pixels a side."""
    train_images: int = 3200
    """Images to train on."""
    validation_images: int = 1000
    """Images to tune on."""
    test_images: int = 6000
    """Images to test on."""
    cache_features: bool = True
    """Compute once what the lowest adapted block sees."""
    against: str = "random"
    """The rule whose accuracies the others' are compared with, seed by seed."""
    methods: Annotated[tuple[str, ...], _Hidden] = ()
    ranks: Annotated[tuple[int, ...], _Hidden] = ()
    learning_steps: Annotated[int, _Hidden] = 0

    def check(self) -> None:
        super().check()
        check_count("location_batches", self.location_batches)
        if not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(f"rules={list(self.rules)}: expected one or more different rules")
        for rule in self.rules:
            check_choice("rules", rule, RULES)
        if self.against not in self.rules:
            raise ValueError(f"against={self.against!r}: expected one of the rules, {', '.join(self.rules)}")

    @property
    def about(self) -> dict[str, Any]:
        hidden = {field.name for field in fields(self)} & {"methods", "ranks", "rules", "learning_steps"}
        return {name: value for name, value in super().about.items() if name not in hidden}
