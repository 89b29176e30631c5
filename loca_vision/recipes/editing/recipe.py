"""Settings for fine-tuning InstructPix2Pix: those of diffusers' script, with its names and defaults, and the adapter's."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

from loca_vision.recipes.diffusion.checks import check_given, check_rates, check_values, settled
from loca_vision.recipes.diffusion.settings import Recipe
from loca_vision.recipes.editing.edit import Sampling
from loca_vision.recipes.editing.loss import dropped
from loca_vision.recipes.editing.presets import EDIT_PRESETS


@dataclass(frozen=True)
class Pairs:
    """Pairs of images and the instructions"""

    dataset_name: str | None = None
    """Pairs on the hub; or a folder with metadata.jsonl or of parquet files, or a parquet file."""
    dataset_config_name: str | None = None
    """The configuration of a data set on the hub that has several."""
    train_data_dir: Path | None = None
    """A folder of pairs, as for --dataset_name; exactly one of the two must be given."""
    original_image_column: str = "input_image"
    """Column of the images to edit."""
    edited_image_column: str = "edited_image"
    """Column of the edited images."""
    edit_prompt_column: str = "edit_prompt"
    """Column of the instructions."""
    conditioning_dropout_prob: float | None = None
    """p: drop the text of a share p of the samples, text and image of another p, and the image of another p."""


@dataclass(frozen=True)
class FirstConvolution:
    """The first convolution, of a base that sees no image yet"""

    train_conv_in: bool = False
    """Also train the UNet's first convolution, and save it with the adapter. A UNet of 4 channels is widened to 8 for it."""
    conv_in_lr: float = 1e-4
    """Learning rate of the first convolution."""


@dataclass(frozen=True)
class EditPictures:
    """Validation images, beyond what all trainers have"""

    validation_image: tuple[str, ...] = ()
    """Images to edit for validation, files or URLs; by default some of the data set's split validation."""
    validation_target: tuple[str, ...] = ()
    """The expected edits, to be shown in the picture."""
    val_image_url: str | None = None
    """One image to edit, under the name of diffusers' flag."""
    validation_image_guidance_scale: float = 1.5
    """How strongly the edits keep to the image."""


@dataclass(frozen=True)
class EditRecipe(EditPictures, FirstConvolution, Pairs, Recipe):
    """Fine-tune Stable Diffusion to follow instructions about images (InstructPix2Pix) with LoCA or another method.

    Stable Diffusion 1, 2 and XL. Every setting of diffusers' train_instruct_pix2pix.py has its name and default here, except
    --non_ema_revision, which is deprecated there, and --local_rank, which launchers no longer use. Unlike there, images keep
    their proportions, an incomplete last batch is left out, and a data set's split `validation` is drawn if no image is named.
    """

    WHAT: ClassVar[str] = "InstructPix2Pix training"
    MARK: ClassVar[str] = "edit_prompt_column"
    FIRST: ClassVar[tuple[str, ...]] = (
        "pretrained_model_name_or_path", "dataset_name", "train_data_dir", "preset", "method", "n_components",
        "learning_rate", "max_train_steps", "resolution", "output_dir",
    )  # fmt: skip

    pretrained_model_name_or_path: str
    """A pipeline in a folder or on the hub: InstructPix2Pix, or plain Stable Diffusion with --train_conv_in."""
    preset: str | None = None
    """Settings of the paper (Appendix L, Table 11): cartoonization or cartoonization-fourierft; flags override them."""
    resolution: int = 256
    """Pixels a side."""
    random_flip: bool = False
    """Mirror half of the pairs in each epoch."""
    validation_prompt: str | None = None
    """Instruction for the validation images."""
    num_validation_images: int = 4
    """Number of seeds for each validation image, or number of images from the split."""
    validation_guidance_scale: float = 7.0
    """How strongly the edits follow the instruction."""
    output_dir: Path = Path("instruct-pix2pix-model")
    """Folder for the adapter, metrics.json, loss.png, validation pictures, config.yaml and checkpoints."""


_NONE = torch.zeros(0)  # for calling a function of samples only to check a setting


def resolve(recipe: EditRecipe, given: Collection[str]) -> EditRecipe:
    """Return the recipe with the method's own settings instead of None, after every check that needs no file.

    Args:
        given: the fields that the user has set; those of another method are refused.

    Raises:
        ValueError: a value is out of range, or settings contradict each other; the error is one sentence.
    """
    check_given(recipe, given)
    _check_contradictions(recipe, given)
    recipe = settled(recipe, given)
    if recipe.val_image_url is not None:
        recipe = replace(recipe, validation_image=(recipe.val_image_url, *recipe.validation_image), val_image_url=None)
    check_values(recipe)
    check_rates(recipe, ("conv_in_lr",), or_zero=True)
    if recipe.conditioning_dropout_prob is not None:
        dropped(_NONE, recipe.conditioning_dropout_prob)
    sampling_of(recipe)
    return recipe


def sampling_of(recipe: EditRecipe) -> Sampling:
    """Return how the edits of a recipe's validation are drawn.

    Raises:
        ValueError: a setting is out of its range.
    """
    return Sampling(recipe.validation_inference_steps, recipe.validation_guidance_scale, recipe.validation_image_guidance_scale)


def _check_contradictions(recipe: EditRecipe, given: Collection[str]) -> None:
    if recipe.preset is not None and EDIT_PRESETS[recipe.preset]["method"] != recipe.method:
        method = EDIT_PRESETS[recipe.preset]["method"]
        raise ValueError(f"preset={recipe.preset!r} is for the method {method}, and --method says {recipe.method}")
    if (recipe.dataset_name is None) == (recipe.train_data_dir is None):
        said = "nothing" if recipe.dataset_name is None else "both"
        raise ValueError(f"--dataset_name or --train_data_dir says where the pairs are; {said} was given")
    if recipe.latents_dir is not None and not (recipe.cache_latents and recipe.center_crop):
        raise ValueError("--latents_dir is for latents that are kept; say --center_crop and not --no-cache_latents")
    if "conv_in_lr" in given and not recipe.train_conv_in:
        raise ValueError(f"conv_in_lr={recipe.conv_in_lr}: say --train_conv_in too")
    images = len(recipe.validation_image) + (recipe.val_image_url is not None)
    if images and recipe.validation_prompt is None:
        raise ValueError("--validation_prompt is missing: what is to be done with the validation image")
    if recipe.validation_target and len(recipe.validation_target) != images:
        raise ValueError(f"validation_target: {len(recipe.validation_target)} of them for {images} validation images")
