"""Settings that all diffusion trainers share, with the names and defaults of diffusers' scripts; one class for each group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from loca_vision.methods.loca import LoCAConfig
from loca_vision.recipes.diffusion.quantised import Quantization
from loca_vision.recipes.settings.adapter_dtype import AdapterDtype
from loca_vision.recipes.settings.method_settings import Assignments, MethodSettings
from loca_vision.recipes.settings.plugins import Imports

Rates = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
PHASES = ("coefficient_steps", "location_steps", "learning_steps", "together")
METHODS = MethodSettings(
    flags={name: name for name in ("n_components", "location_init", "location_gradient", "use_dora", "eta", "basis")}
    | {"scale": "loca_scale", "r": "rank", "alpha": "lora_alpha"},
    schedule=frozenset({*PHASES, "location_batches", "location_rule", "location_lr"}),
    task=lambda config, chosen: config.editing_defaults(chosen),
)


@dataclass(frozen=True)
class BaseModel:
    """The model that is adapted"""

    pretrained_model_name_or_path: str
    """A pipeline in a folder or on the hub."""
    revision: str | None = None
    """Revision of the pipeline on the hub."""
    variant: str | None = None
    """Variant of the pipeline's files, such as fp16."""
    cache_dir: Path | None = None
    """Folder for downloads from the hub, and for the cache of the library datasets."""


@dataclass(frozen=True)
class Images:
    """Images: their size, and what is read and kept before training"""

    resolution: int = 512
    """Pixels a side."""
    center_crop: bool = False
    """Crop the centre square of each image; otherwise another square in each epoch."""
    random_flip: bool = False
    """Mirror half of the images in each epoch."""
    max_train_samples: int | None = None
    """Train on this many samples only, drawn by the seed."""
    check_images: bool = True
    """Read every image once before the first step, so that a broken one is reported at once."""
    cache_latents: bool = True
    """Encode images and texts once and keep them on disk, unless crops are random."""
    latents_dir: Path | None = None
    """Folder of the cache, which several runs may share; by default latents/ in the output folder."""
    dataloader_num_workers: int = 0
    """Processes that decode images."""


@dataclass(frozen=True)
class Method:
    """What is trained: the method and its settings"""

    method: Annotated[str, METHODS.help_of_method()] = LoCAConfig.method
    """What is trained."""
    imports: Imports = ()
    """A module, by its name or as a .py file, that defines methods; may be repeated."""
    set: Assignments = ()
    """A field of the method that has no flag of its own here; may be repeated."""
    targets: tuple[Literal["q", "k", "v", "out", "fc1", "fc2", "proj_in", "proj_out", "linear"], ...] = ("q", "k", "v", "out")
    """Adapted projections: parts of attention and feed-forward layers, those around blocks, or every linear layer."""
    layers: tuple[str, ...] = ()
    """Name patterns of the layers to adapt, such as "*attn2*" or "!mid_block" (all but those); all by default."""
    n_components: Annotated[int | None, METHODS.help("n_components")] = None
    """Coefficients of each projection."""
    loca_scale: Annotated[float | None, METHODS.help("loca_scale")] = None
    """Factor of the update."""
    location_lr: Annotated[float, METHODS.help("location_lr")] = 1e-4
    """Learning rate of the locations, in units of the whole axis."""
    location_init: Annotated[Literal["uniform", "gradient"], METHODS.help("location_init")] = "uniform"
    """Where components start: anywhere, or at cells chosen by the gradient of the first batches."""
    location_batches: Annotated[int, METHODS.help("location_batches")] = 16
    """Steps of the run that choosing locations by gradient takes."""
    location_rule: Annotated[Literal["largest", "sampled"], METHODS.help("location_rule")] = "largest"
    """Choose the cells with the largest gradients, or draw cells in proportion to their squared gradients."""
    location_gradient: Annotated[Literal["central", "forward", "backward"], METHODS.help("location_gradient")] = "central"
    """The finite difference for the gradient of the locations."""
    coefficient_steps: Annotated[int, METHODS.help("coefficient_steps")] = 10
    """B_a: optimiser steps in which the coefficients move, in turn with the locations."""
    location_steps: Annotated[int, METHODS.help("location_steps")] = 20
    """B_l: optimiser steps in which the locations move, in turn with the coefficients."""
    learning_steps: Annotated[int | None, METHODS.help("learning_steps")] = 1200
    """B_s: steps after which the locations are final. 0: fixed random ones. None: alternate to the end."""
    together: Annotated[bool, METHODS.help("together")] = False
    """Move both in each of the learning steps."""
    seed_locations: int | None = None
    """Seed of the initial locations or factors; by default --seed."""
    rank: Annotated[int | None, METHODS.help("rank")] = None
    """The rank."""
    lora_alpha: Annotated[float | None, METHODS.help("lora_alpha")] = None
    """The factor of the update, times the rank; by default the rank."""
    use_dora: Annotated[bool, METHODS.help("use_dora")] = False
    """Learn the magnitude of each row separately from its direction."""
    eta: Annotated[float | None, METHODS.help("eta")] = None
    """The share of each factor's spectrum that is zero."""
    basis: Annotated[Literal["haar", "fft"], METHODS.help("basis")] = "haar"
    """The transform of the spectra."""
    adapter_dtype: AdapterDtype = "float32"
    """Precision of the coefficients in the saved file; they are trained in float32."""


@dataclass(frozen=True)
class Optimisation:
    """Steps, rates and the optimiser"""

    train_batch_size: int = 16
    """Samples per process in each of the accumulated parts of a step."""
    num_train_epochs: int = 100
    """Passes over the samples."""
    max_train_steps: int | None = None
    """Number of optimiser steps; overrides the epochs."""
    gradient_accumulation_steps: int = 1
    """Parts of a step, whose gradients are accumulated."""
    learning_rate: float = 1e-4
    """Learning rate of the coefficients or factors."""
    scale_lr: bool = False
    """Multiply the learning rate by processes, accumulation steps and batch size."""
    lr_scheduler: Rates = "constant"
    """Schedule of all rates."""
    lr_warmup_steps: int = 500
    """Steps in which the rates rise, for schedulers with a warmup."""
    snr_gamma: float | None = None
    """Weight samples by min(SNR, gamma) (Hang et al., 2023); they suggest 5."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts; by default as in the pipeline's scheduler. At inference the scheduler must be set to it too."""
    adam_beta1: float = 0.9
    """AdamW: decay of the mean of gradients."""
    adam_beta2: float = 0.999
    """AdamW: decay of the mean of squared gradients."""
    adam_weight_decay: float = 1e-2
    """Weight decay of everything but locations."""
    adam_epsilon: float = 1e-8
    """AdamW: the number added to the denominator."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient of everything that is trained."""
    use_ema: bool = False
    """Save and validate the exponential moving average of what is trained; locations are not averaged."""
    ema_decay: float = 0.9999
    """The decay that the average approaches."""
    seed: int | None = None
    """Seed of all random numbers; by default a random one is drawn and recorded."""


@dataclass(frozen=True)
class Memory:
    """Memory and speed"""

    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of products and of the frozen weights; by default as in accelerate's configuration."""
    quantization: Quantization | None = None
    """Keep the denoiser's frozen weights in 8 or 4 bits, by bitsandbytes, torchao or optimum-quanto."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    use_8bit_adam: bool = False
    """Use bitsandbytes' AdamW, which must be installed; tensors of fewer than 4096 numbers keep their full-precision state."""
    allow_tf32: bool = False
    """Let GPUs multiply float32 matrices faster and less exactly."""
    enable_xformers_memory_efficient_attention: bool = False
    """Use xformers' attention, which must be installed, instead of torch's own."""


@dataclass(frozen=True)
class Pictures:
    """Validation pictures"""

    validation_prompt: str | None = None
    """Text for validation pictures."""
    num_validation_images: int = 4
    """Number of pictures, each with its own seed."""
    validation_epochs: int = 1
    """Draw validation pictures each time this many epochs are done..."""
    validation_steps: int | None = None
    """...or this many steps instead."""
    validation_scales: tuple[float, ...] = (0.5, 1.0)
    """Scales of the adapter in the pictures; the base model is always drawn."""
    validation_inference_steps: int = 20
    """Denoising steps of each picture."""
    validation_guidance_scale: float | None = None
    """How strongly the pictures follow the text; by default as in the pipeline."""


@dataclass(frozen=True)
class Output:
    """Output, checkpoints and reports"""

    output_dir: Path = Path("model")
    """Folder for the adapter, metrics.json, loss.png, validation pictures, config.yaml and checkpoints."""
    checkpointing_steps: int = 500
    """Write a checkpoint every this many steps."""
    checkpoints_total_limit: int | None = None
    """Number of checkpoints to keep; an old one is deleted only after a new one is complete."""
    resume_from_checkpoint: str | None = None
    """Continue from this checkpoint, or from the `latest` complete one in the output folder, to the same numbers."""
    logging_dir: Path = Path("logs")
    """Folder for the tracker, in the output folder."""
    report_to: Literal["tensorboard", "wandb", "comet_ml", "all", "none"] = "tensorboard"
    """Trackers that get curves and pictures, through accelerate."""
    push_to_hub: bool = False
    """Upload the adapter with a model card."""
    hub_model_id: str | None = None
    """The repository, as in user/name; by default the name of the output folder."""
    hub_private: bool = False
    """Make a new repository private."""
    hub_token: str | None = None
    """Token for the upload, if you are not logged in; it is never written to a file."""
    config: Path | None = None
    """A YAML file of these settings; every run writes one."""


@dataclass(frozen=True)
class Recipe(Output, Pictures, Memory, Optimisation, Method, Images, BaseModel):
    """The settings for adapting a diffusion model, whatever the task.

    Attributes:
        WHAT: what the training is called in a sentence.
        MARK: a setting that no other trainer has, by which a checkpoint is recognised.
    """

    WHAT: ClassVar[str] = "the training of a diffusion model"
    MARK: ClassVar[str] = ""
