"""The settings of the study of location rules."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from classifier_study.settings import Study
from loca_vision.checks import check_choice, check_count
from location_study.rules import RULES

_Hidden: Any = tyro.conf.Suppress  # settings of the classifier study that have no meaning here


@dataclass(frozen=True)
class RuleStudy(Study):
    """Compare rules that choose the cells of a cosine spectrum, at equal budgets, grids of rates and steps."""

    dataset: Literal["cifar10", "cifar100", "fashion_mnist", "digits", "folder", "eurosat", "dtd", "oxford_pets"] = "folder"
    """Data set."""
    output_dir: Path = Path("location-rules")
    """Output folder: a folder for every run, and runs.json, study.md and study.png."""
    rules: tuple[str, ...] = tuple(RULES)
    """Rules to compare."""
    budgets: tuple[int, ...] = (30, 300)
    """Components of each projection."""
    layers: tuple[str, ...] = ("blocks.[6-9]", "blocks.1?")
    """Name patterns of the layers whose query and value are adapted; they must match whole blocks."""
    location_batches: int = 16
    """Number of training batches whose gradients the rules see; their cost is not counted for any rule."""
    head: Literal["probe", "new"] = "probe"
    """Classifier head for the gradients: the head of a trained linear probe, or the run's own new head."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the runs at the best rate. Rates are tuned with the first seed."""
    image_size: int = 42
    """Pixels per side."""
    train_images: int = 3200
    """Number of training images."""
    validation_images: int = 1000
    """Number of validation images, on which rates are tuned."""
    test_images: int = 6000
    """Number of test images."""
    cache_features: bool = True
    """Compute the inputs of the lowest adapted block only once."""
    against: str = "random"
    """Baseline rule: its accuracies are compared with those of the others, seed by seed."""
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
