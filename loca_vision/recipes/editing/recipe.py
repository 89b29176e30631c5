"""How InstructPix2Pix is fine-tuned: the settings of diffusers' script, by their names and defaults, and the adapter's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from loca_vision.checks import check_count, check_share, is_finite
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.loca import LoCAConfig
from loca_vision.recipes.editing.loss import dropped, min_snr_weights
from loca_vision.recipes.editing.presets import EDIT_PRESETS
from loca_vision.recipes.settings.method_settings import Assignments, MethodSettings, as_assignments, assigned
from loca_vision.recipes.settings.plugins import Imports

Rates = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
_PHASES = ("coefficient_steps", "location_steps", "learning_steps", "together")
METHODS = MethodSettings(
    flags={name: name for name in ("n_components", "location_gradient", "use_dora", "eta", "basis")}
    | {"scale": "loca_scale", "r": "rank", "alpha": "lora_alpha"},
    schedule=frozenset({*_PHASES, "location_lr"}),
    task=lambda config, chosen: config.editing_defaults(chosen),
)


@dataclass(frozen=True)
class EditRecipe:
    """Fine-tune Stable Diffusion to follow instructions about images (InstructPix2Pix) with LoCA or another method.

    Every setting of diffusers' train_instruct_pix2pix.py has its name and default here, but for --non_ema_revision, which is
    deprecated there, and --local_rank, which launchers have given up. Unlike there, images keep their proportions, a last batch
    that is not whole is left out, and a data set's split `validation` is drawn where no image is named.
    """

    pretrained_model_name_or_path: str
    """A pipeline in a folder or on the hub: InstructPix2Pix, or plain Stable Diffusion with --train_conv_in."""
    revision: str | None = None
    """Revision of the pipeline on the hub."""
    variant: str | None = None
    """Variant of the pipeline's files, such as fp16."""
    dataset_name: str | None = None
    """Pairs on the hub; or a folder with metadata.jsonl, one of parquet files, or a parquet file."""
    dataset_config_name: str | None = None
    """The configuration of a data set on the hub that has several."""
    train_data_dir: Path | None = None
    """A folder of pairs, as --dataset_name takes it; one of the two is given."""
    original_image_column: str = "input_image"
    """Column of the images to edit."""
    edited_image_column: str = "edited_image"
    """Column of the edited images."""
    edit_prompt_column: str = "edit_prompt"
    """Column of the instructions."""
    max_train_samples: int | None = None
    """Train on this many pairs only, drawn by the seed."""
    cache_dir: Path | None = None
    """Folder for downloads from the hub, and for the cache of the library datasets."""
    check_images: bool = True
    """Read every pair once before the first step, so that a broken image is named at once."""
    cache_latents: bool = True
    """Encode images and texts once and keep them on disk, unless crops are random."""
    latents_dir: Path | None = None
    """Folder of the cache, which several runs may share; by default latents/ in the output folder."""

    preset: str | None = None
    """Settings of the paper (Appendix L, Table 11): cartoonization or cartoonization-fourierft; flags win over them."""
    method: Annotated[str, METHODS.help_of_method()] = LoCAConfig.method
    """What is trained."""
    imports: Imports = ()
    """A module, by its name or as a .py file, that defines methods; may be repeated."""
    set: Assignments = ()
    """A field of the method that has no flag of its own here; may be repeated."""
    targets: tuple[Literal["q", "k", "v", "out", "fc1", "fc2", "proj_in", "proj_out", "linear"], ...] = ("q", "k", "v", "out")
    """Adapted projections: parts of attention and feed-forward layers, those around blocks, or every linear layer."""
    layers: tuple[str, ...] = ()
    """Name patterns of the layers to adapt, as in "*attn2*" or "!mid_block" (all but those); all by default."""
    n_components: Annotated[int | None, METHODS.help("n_components")] = None
    """Coefficients of each projection."""
    loca_scale: Annotated[float | None, METHODS.help("loca_scale")] = None
    """The factor of the update."""
    location_lr: Annotated[float, METHODS.help("location_lr")] = 1e-4
    """Learning rate of the locations, in units of the whole axis."""
    location_gradient: Annotated[Literal["central", "forward", "backward"], METHODS.help("location_gradient")] = "central"
    """The difference for the gradient of the locations."""
    coefficient_steps: Annotated[int, METHODS.help("coefficient_steps")] = 10
    """B_a, optimiser steps in which the coefficients move, before..."""
    location_steps: Annotated[int, METHODS.help("location_steps")] = 20
    """B_l, those in which the locations do."""
    learning_steps: Annotated[int | None, METHODS.help("learning_steps")] = 1200
    """B_s, after which the locations are final. 0: fixed random ones. None: alternate to the end."""
    together: Annotated[bool, METHODS.help("together")] = False
    """Move both at each of the learning steps."""
    seed_locations: int | None = None
    """Seed of the first locations, or factors; by default --seed."""
    rank: Annotated[int | None, METHODS.help("rank")] = None
    """The rank."""
    lora_alpha: Annotated[float | None, METHODS.help("lora_alpha")] = None
    """The factor of the update, times the rank; by default the rank."""
    use_dora: Annotated[bool, METHODS.help("use_dora")] = False
    """Learn the magnitude of each row apart from its direction."""
    eta: Annotated[float | None, METHODS.help("eta")] = None
    """The share of each factor's spectrum that is zero."""
    basis: Annotated[Literal["haar", "fft"], METHODS.help("basis")] = "haar"
    """The transform of the spectra."""
    train_conv_in: bool = False
    """Train the UNet's first convolution too, and save it with the adapter. A UNet of 4 channels is widened to 8 for it."""
    conv_in_lr: float = 1e-4
    """Its learning rate."""
    adapter_dtype: Literal["float32", "float16"] = "float32"
    """Precision of the coefficients in the saved file; they are trained in float32."""

    resolution: int = 256
    """Pixels a side."""
    center_crop: bool = False
    """Take the middle square of each image; otherwise another one in each epoch."""
    random_flip: bool = False
    """Mirror half of the pairs in each epoch."""
    train_batch_size: int = 16
    """Pairs of each process in each of the accumulated parts of a step."""
    num_train_epochs: int = 100
    """Passes over the pairs."""
    max_train_steps: int | None = None
    """Optimiser steps; they win over the epochs."""
    gradient_accumulation_steps: int = 1
    """Parts of a step."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    learning_rate: float = 1e-4
    """Learning rate of the coefficients, or factors."""
    scale_lr: bool = False
    """Multiply the learning rate by processes, accumulation steps and batch size."""
    lr_scheduler: Rates = "constant"
    """How all rates change."""
    lr_warmup_steps: int = 500
    """Steps in which the rates rise, with a scheduler that has a warmup."""
    conditioning_dropout_prob: float | None = None
    """p: leave out the text of p of the samples, text and image of another p, the image of another p."""
    snr_gamma: float | None = None
    """Weigh samples by min(SNR, gamma) (Hang et al., 2023); they suggest 5."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the UNet predicts; by default what the pipeline's scheduler says. At inference its scheduler must say so, too."""
    use_8bit_adam: bool = False
    """AdamW of bitsandbytes, where that is installed; it keeps tensors of fewer than 4096 numbers as they are."""
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
    """Save and validate the exponential moving average of coefficients (or factors) and conv_in; locations as they are."""
    ema_decay: float = 0.9999
    """The decay that the average approaches."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of products and of the frozen weights; by default that of accelerate's configuration."""
    allow_tf32: bool = False
    """Let GPUs multiply float32 matrices faster and less exactly."""
    enable_xformers_memory_efficient_attention: bool = False
    """Attention of xformers, where that is installed; torch's own otherwise."""
    dataloader_num_workers: int = 0
    """Processes that decode images."""
    seed: int | None = None
    """Seed of all random numbers; without one, one is drawn and recorded."""

    validation_prompt: str | None = None
    """Instruction for validation images."""
    validation_image: tuple[str, ...] = ()
    """Images to edit for validation, files or URLs; without any, some of the data set's split validation."""
    validation_target: tuple[str, ...] = ()
    """The expected edits, to be shown in the picture."""
    val_image_url: str | None = None
    """One image to edit, under the name of diffusers' flag."""
    num_validation_images: int = 4
    """Seeds of each validation image, or images of the split."""
    validation_epochs: int = 1
    """Draw validation images each time this many epochs are done..."""
    validation_steps: int | None = None
    """...or this many steps instead."""
    validation_scales: tuple[float, ...] = (0.5, 1.0)
    """Scales of the adapter in them; the base model is always drawn."""
    validation_inference_steps: int = 20
    """Denoising steps of each."""
    validation_guidance_scale: float = 7.0
    """How strongly they follow the instruction."""
    validation_image_guidance_scale: float = 1.5
    """How strongly they keep to the image."""

    output_dir: Path = Path("instruct-pix2pix-model")
    """Where the adapter, metrics.json, loss.png, validation pictures, config.yaml and checkpoints go."""
    checkpointing_steps: int = 500
    """Write a checkpoint each time this many steps are done."""
    checkpoints_total_limit: int | None = None
    """How many checkpoints are kept; an old one is deleted only after a new one is complete."""
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
    """Token for the upload, if nobody is logged in; it is never written to a file."""
    config: Path | None = None
    """A YAML file of these settings, as every run writes one."""


# What may differ between a run and its continuation.
MAY_DIFFER_ON_RESUME = {
    "output_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit", "report_to", "logging_dir",
    "push_to_hub", "hub_model_id", "hub_private", "hub_token", "config", "preset", "imports", "dataloader_num_workers",
    "cache_dir", "check_images", "cache_latents", "latents_dir", "adapter_dtype", "gradient_checkpointing",
    "train_batch_size", "gradient_accumulation_steps",  # their product with the processes, `batch_of`, is compared
}  # fmt: skip
_NONE = torch.zeros(0)  # to ask functions of samples whether they take a setting
_LENGTH = {"max_train_steps", "num_train_epochs"}  # may differ too, where the rates do not depend on it


def resolve(recipe: EditRecipe, given: Collection[str]) -> EditRecipe:
    """The recipe with the method's own settings instead of None, after every check that needs no file.

    Args:
        given: the fields that the user has set; of another method's, they are refused.

    Raises:
        ValueError: a value out of range, or settings that contradict each other; one sentence.
    """
    _check_contradictions(recipe, given)
    usual = METHODS.defaults(recipe.method, METHODS.chosen(recipe.method, recipe))
    recipe = replace(recipe, **{name: value for name, value in usual.items() if getattr(recipe, name) is None})
    own = as_assignments(assigned(recipe.set))
    recipe = replace(recipe, set=own, imports=tuple(dict.fromkeys(recipe.imports)))
    recipe = replace(recipe, cache_latents=recipe.cache_latents and recipe.center_crop)
    if "validation_epochs" in given and "validation_steps" not in given:  # which a preset may have set
        recipe = replace(recipe, validation_steps=None)
    places = {name: getattr(recipe, name) for name in ("output_dir", "cache_dir", "latents_dir")}
    recipe = replace(recipe, **{name: place.expanduser() for name, place in places.items() if place is not None})
    if recipe.val_image_url is not None:
        recipe = replace(recipe, validation_image=(recipe.val_image_url, *recipe.validation_image), val_image_url=None)
    _check_numbers(recipe)
    _check_installed(recipe)
    adapter_of(recipe)
    return recipe


def adapter_of(recipe: EditRecipe) -> AdapterConfig:
    """What to inject into the UNet."""
    seed = recipe.seed if recipe.seed_locations is None else recipe.seed_locations
    config = METHODS.config(recipe, seed or 0)
    assert config is not None
    return config


def phases_of(recipe: EditRecipe) -> dict[str, Any]:
    """Settings of the alternating schedule."""
    return {name: getattr(recipe, name) for name in _PHASES}


def batch_of(recipe: EditRecipe, processes: int) -> int:
    """Pairs of each optimiser step, of all processes together."""
    return recipe.train_batch_size * recipe.gradient_accumulation_steps * processes


def differences(recipe: EditRecipe, saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The settings that differ from those of the run to be continued, as sentences."""
    passed = MAY_DIFFER_ON_RESUME | {
        field.name for field in fields(recipe) if field.name.startswith(("validation_", "num_validation_"))
    }
    if recipe.lr_scheduler.startswith("constant"):
        passed |= _LENGTH
    saved = {"set": [], "layers": []} | saved  # which earlier versions did not have
    names = [field.name for field in fields(recipe) if field.name not in passed]
    return [f"{name}={now[name]!r}, {saved.get(name)!r} before" for name in names if saved.get(name) != now[name]]


def _check_contradictions(recipe: EditRecipe, given: Collection[str]) -> None:
    METHODS.check(recipe.method, given)
    if recipe.preset is not None and EDIT_PRESETS[recipe.preset]["method"] != recipe.method:
        method = EDIT_PRESETS[recipe.preset]["method"]
        raise ValueError(f"preset={recipe.preset!r} is for the method {method}, and --method says {recipe.method}")
    if (recipe.dataset_name is None) == (recipe.train_data_dir is None):
        said = "nothing" if recipe.dataset_name is None else "both"
        raise ValueError(f"--dataset_name or --train_data_dir says where the pairs are; {said} was given")
    if recipe.together and recipe.learning_steps == 0:
        raise ValueError("--together moves locations, and learning_steps=0 keeps them from moving: choose one")
    if "cache_latents" in given and recipe.cache_latents and not recipe.center_crop:
        raise ValueError("--cache_latents: latents of random crops cannot be kept; say --center_crop too")
    if recipe.latents_dir is not None and not (recipe.cache_latents and recipe.center_crop):
        raise ValueError("--latents_dir is for latents that are kept; say --center_crop and not --no-cache_latents")
    if "conv_in_lr" in given and not recipe.train_conv_in:
        raise ValueError(f"conv_in_lr={recipe.conv_in_lr}: say --train_conv_in too")
    if "ema_decay" in given and not recipe.use_ema:
        raise ValueError(f"ema_decay={recipe.ema_decay}: say --use_ema too")
    _check_validation(recipe)
    for name in ("hub_model_id", "hub_private", "hub_token"):
        if getattr(recipe, name) and not recipe.push_to_hub:
            raise ValueError(f"--{name}: say --push_to_hub too")
    if recipe.hub_token is not None and recipe.report_to not in ("tensorboard", "none"):
        raise ValueError(
            f"--hub_token: with report_to={recipe.report_to!r} the command line goes to others, and the token with it; "
            "log in with `hf auth login` instead"
        )


def _check_validation(recipe: EditRecipe) -> None:
    images = len(recipe.validation_image) + (recipe.val_image_url is not None)
    if images and recipe.validation_prompt is None:
        raise ValueError("--validation_prompt is missing: what is to be done with the validation image")
    if recipe.validation_target and len(recipe.validation_target) != images:
        raise ValueError(f"validation_target: {len(recipe.validation_target)} of them for {images} validation images")


# Whole numbers, and the least that each may be.
_COUNTS = {
    "resolution": 1, "train_batch_size": 1, "num_train_epochs": 1, "gradient_accumulation_steps": 1,
    "num_validation_images": 1, "validation_epochs": 1, "validation_inference_steps": 1, "checkpointing_steps": 1,
    "lr_warmup_steps": 0, "dataloader_num_workers": 0,
}  # fmt: skip
_MAYBE = {
    "max_train_samples": 1, "max_train_steps": 1, "validation_steps": 1, "checkpoints_total_limit": 1, "seed": 0,
    "seed_locations": 0,
}  # fmt: skip


def _check_numbers(recipe: EditRecipe) -> None:
    for name, least in (_COUNTS | _MAYBE).items():
        if name in _COUNTS or getattr(recipe, name) is not None:
            check_count(name, getattr(recipe, name), least)
    if recipe.seed is not None and recipe.seed >= 2**32:
        raise ValueError(f"seed={recipe.seed}: it is below 2^32, as numpy's are")
    for name in ("learning_rate", "location_lr", "conv_in_lr", "adam_weight_decay"):
        _check_above(name, getattr(recipe, name), or_zero=True)
    for name in ("adam_epsilon", "max_grad_norm"):
        _check_above(name, getattr(recipe, name), or_zero=False)
    for name in ("adam_beta1", "adam_beta2"):
        check_share(name, getattr(recipe, name), open_end=True)
    check_share("ema_decay", recipe.ema_decay)
    for scale in recipe.validation_scales:
        if not is_finite(scale):
            raise ValueError(f"validation_scales={scale!r}: each is a finite number")
    if recipe.conditioning_dropout_prob is not None:
        dropped(_NONE, recipe.conditioning_dropout_prob)
    if recipe.snr_gamma is not None:
        min_snr_weights(_NONE, recipe.snr_gamma, "epsilon")


def _check_installed(recipe: EditRecipe) -> None:
    """Before models are loaded, which takes a while."""
    for name, library in (("use_8bit_adam", "bitsandbytes"), ("enable_xformers_memory_efficient_attention", "xformers")):
        if getattr(recipe, name) and find_spec(library) is None:
            raise ValueError(f"--{name}: it needs {library}; python -m pip install {library}")


def _check_above(name: str, value: float, *, or_zero: bool) -> None:
    if not is_finite(value) or value < 0 or (value == 0 and not or_zero):
        raise ValueError(f"{name} must be a finite number {'from 0 up' if or_zero else 'above 0'}, got {value!r}")
