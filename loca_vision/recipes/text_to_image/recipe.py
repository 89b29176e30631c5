"""How a pipeline learns a subject, a style or a concept: the settings of diffusers' scripts, by their names and defaults."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from loca_vision.checks import check_count, check_share, is_finite
from loca_vision.recipes.diffusion.checks import check_given, check_rates, check_values, settled
from loca_vision.recipes.diffusion.drawing import Picture
from loca_vision.recipes.diffusion.flow import Weighting
from loca_vision.recipes.diffusion.settings import Recipe

# What diffusers' DreamBooth scripts have in the place of their text-to-image script's defaults.
DREAMBOOTH: dict[str, Any] = {"train_batch_size": 4, "num_train_epochs": 1, "validation_epochs": 50}


@dataclass(frozen=True)
class Captions:
    """Images with captions: a style, or a concept"""

    dataset_name: str | None = None
    """Images with captions on the hub; or a folder or parquet file, as --train_data_dir."""
    dataset_config_name: str | None = None
    """The configuration of a data set on the hub that has several."""
    train_data_dir: Path | None = None
    """A folder of images with metadata.jsonl, or with a .txt beside each; or of parquet files."""
    image_column: str = "image"
    """Column of the images."""
    caption_column: str = "text"
    """Column of the captions."""
    caption_dropout: float = 0.0
    """The share of samples whose caption is left out, so that guidance keeps working."""
    use_aspect_ratio_buckets: bool = False
    """Crop images to the nearest of several shapes of about the same area, instead of to squares."""
    aspect_ratio_buckets: str | None = None
    """These shapes: "height,width;height,width"; by default made of --resolution."""


@dataclass(frozen=True)
class Subject:
    """A subject (DreamBooth)"""

    instance_data_dir: Path | None = None
    """A folder of a few images of the subject."""
    instance_prompt: str | None = None
    """The caption of all images, with a rare word for the subject, as in "a photo of sks dog"."""
    with_prior_preservation: bool = False
    """Train on images of the subject's class too, which the base itself has drawn, so that the class is not forgotten."""
    class_prompt: str | None = None
    """The caption of the class, as in "a photo of a dog"."""
    class_data_dir: Path | None = None
    """Its images; what is missing is drawn. By default class/ in the output folder."""
    num_class_images: int = 100
    """How many there are to be."""
    prior_loss_weight: float = 1.0
    """How much their loss counts."""
    sample_batch_size: int = 4
    """Class images that are drawn at once."""


@dataclass(frozen=True)
class Texts:
    """Text encoders"""

    train_text_encoder: bool = False
    """Adapt the text encoders too: of Stable Diffusion 1 to 3 the CLIPs, of Flux.1 its CLIP."""
    text_encoder_lr: float | None = None
    """Their learning rate; by default --learning_rate."""
    max_sequence_length: int | None = None
    """Tokens of a caption that T5 or a language model reads; by default 77 of Stable Diffusion 3 and 512 of Flux."""


@dataclass(frozen=True)
class Noise:
    """Noise, and how it is drawn and weighed"""

    noise_offset: float = 0.0
    """Times a random number for each channel, added to the noise: pictures may become darker and lighter (SD 1, 2, XL)."""
    weighting_scheme: Weighting | None = None
    """Flow matching: how timesteps are drawn or weighed; by default logit_normal of SD 3 and none of Flux."""
    logit_mean: float = 0.0
    """Of logit_normal."""
    logit_std: float = 1.0
    """Of logit_normal."""
    mode_scale: float = 1.29
    """Of mode."""
    precondition_outputs: bool | None = None
    """Measure the error of the image that a prediction means, instead of the velocity's; by default of SD 3 alone."""
    guidance_scale: float = 3.5
    """What Flux models with built-in guidance are told in training."""


@dataclass(frozen=True)
class ImageRecipe(Noise, Texts, Subject, Captions, Recipe):
    """Teach a pipeline a subject (DreamBooth), a style or a concept with LoCA or another method.

    Stable Diffusion 1, 2, XL and 3, Flux.1 and Flux.2. Settings have the names of diffusers' train_text_to_image_lora.py and
    train_dreambooth_lora*.py. Unlike there, images keep their proportions, and every batch is whole: the last one of an epoch
    is filled up with further images.
    """

    WHAT: ClassVar[str] = "text-to-image training"
    MARK: ClassVar[str] = "instance_prompt"
    FIRST: ClassVar[tuple[str, ...]] = (
        "pretrained_model_name_or_path", "train_data_dir", "instance_data_dir", "instance_prompt", "method", "n_components",
        "learning_rate", "max_train_steps", "resolution", "output_dir",
    )  # fmt: skip

    pretrained_model_name_or_path: str
    """A text-to-image pipeline in a folder or on the hub."""
    validation_prompt: str | None = None
    """Text of the validation pictures; without one, none are drawn."""
    validation_inference_steps: int = 25
    """Denoising steps of each."""
    output_dir: Path = Path("text-to-image-model")
    """Where the adapter, metrics.json, loss.png, validation pictures, config.yaml and checkpoints go."""

    @property
    def source(self) -> str | Path:
        """Where the images are."""
        return self.instance_data_dir or self.train_data_dir or self.dataset_name or ""

    @property
    def class_folder(self) -> Path:
        """Where the class images are, or are to be."""
        return self.class_data_dir or self.output_dir / "class"


def resolve(recipe: ImageRecipe, given: Collection[str]) -> ImageRecipe:
    """The recipe with the method's own settings instead of None, after every check that needs no file.

    Args:
        given: the fields that the user has set; of another method's, they are refused.

    Raises:
        ValueError: a value out of range, or settings that contradict each other; one sentence.
    """
    check_given(recipe, given)
    _check_source(recipe, given)
    _check_subject(recipe, given)
    if recipe.aspect_ratio_buckets is not None and not recipe.use_aspect_ratio_buckets:
        raise ValueError("--aspect_ratio_buckets: say --use_aspect_ratio_buckets too")
    if recipe.text_encoder_lr is not None and not recipe.train_text_encoder:
        raise ValueError(f"text_encoder_lr={recipe.text_encoder_lr}: say --train_text_encoder too")
    if recipe.location_init == "gradient" and recipe.train_text_encoder:
        raise ValueError("--location_init gradient: it chooses for the denoiser alone, and --train_text_encoder adapts more")
    if recipe.instance_prompt is not None:
        recipe = replace(recipe, **{name: value for name, value in DREAMBOOTH.items() if name not in given})
    recipe = settled(recipe, given)
    check_values(recipe)
    _check_numbers(recipe)
    return recipe


def picture_of(recipe: ImageRecipe, more: Mapping[str, Any] | None = None) -> Picture:
    """How the validation pictures of a recipe are drawn.

    Raises:
        ValueError: a setting out of its range.
    """
    side = recipe.resolution
    return Picture(side, side, recipe.validation_inference_steps, recipe.validation_guidance_scale, more)


def _check_source(recipe: ImageRecipe, given: Collection[str]) -> None:
    names = ("dataset_name", "train_data_dir", "instance_data_dir")
    told = [name for name in names if getattr(recipe, name) is not None]
    if len(told) != 1:
        said = " and ".join(f"--{name}" for name in told) or "nothing"
        raise ValueError(f"--dataset_name, --train_data_dir or --instance_data_dir says where the images are; {said} was given")
    if recipe.instance_data_dir is not None and recipe.instance_prompt is None:
        raise ValueError("--instance_prompt is missing: the caption of the images of the subject")
    if recipe.instance_prompt is not None and "caption_column" in given:
        raise ValueError("--instance_prompt is the caption of all images, and --caption_column names others: choose one")
    for name in ("instance_prompt", "class_prompt"):
        text = getattr(recipe, name)
        if text is not None and not text.strip():
            raise ValueError(f"{name}={text!r}: expected a text, got an empty one")


def _check_subject(recipe: ImageRecipe, given: Collection[str]) -> None:
    if not recipe.with_prior_preservation:
        for name in ("class_prompt", "class_data_dir", "num_class_images", "prior_loss_weight", "sample_batch_size"):
            if name in given:
                raise ValueError(f"{name}={getattr(recipe, name)!r}: say --with_prior_preservation too")
        return
    if recipe.class_prompt is None:
        raise ValueError("--class_prompt is missing: the caption of the class images of --with_prior_preservation")
    if recipe.instance_prompt is None:
        raise ValueError("--with_prior_preservation is for a subject: say --instance_prompt too")
    folder = recipe.class_folder.expanduser().resolve()
    source = Path(recipe.source).expanduser().resolve()
    if source.is_dir() and (folder == source or source in folder.parents):
        fault = "images of the class in there would be taken for images to learn; choose another folder"
        raise ValueError(f"{recipe.class_folder}: {fault}")


def _check_numbers(recipe: ImageRecipe) -> None:
    for name in ("num_class_images", "sample_batch_size"):
        check_count(name, getattr(recipe, name))
    if recipe.max_sequence_length is not None:
        check_count("max_sequence_length", recipe.max_sequence_length)
    check_share("caption_dropout", recipe.caption_dropout)
    check_rates(recipe, ("prior_loss_weight", "noise_offset", "logit_std", "mode_scale", "guidance_scale"), or_zero=True)
    if recipe.text_encoder_lr is not None:
        check_rates(recipe, ("text_encoder_lr",), or_zero=True)
    if not is_finite(recipe.logit_mean):
        raise ValueError(f"logit_mean must be a finite number, got {recipe.logit_mean!r}")
    picture_of(recipe)
