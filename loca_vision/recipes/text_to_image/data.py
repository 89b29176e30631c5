"""The images that a text-to-image model is trained on: read, checked and cached, together with those of the class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from loca_vision.data.buckets import Size, buckets_for, parse_buckets
from loca_vision.data.captions import CaptionedImages, read_captioned
from loca_vision.data.check_images import check_readable
from loca_vision.recipes.diffusion.encoders import Encoders
from loca_vision.recipes.text_to_image.recipe import ImageRecipe
from loca_vision.recipes.text_to_image.samples import Plan, kept


class ImageData:
    """Images to train on.

    Args:
        recipe: a settled recipe, with its seed.
        images: the images to learn.
        encoders: the encoders of the pipeline.
        accelerator: of several processes the first fills the cache, and the others find everything there.

    Attributes:
        prior: images of the class; None without prior preservation.
        samples: the data set; `set_epoch` changes its views.
        texts: the encoded captions, class text and empty text; None if text encoders are trained.
        cut_captions: for captions that are too long, by position: the number of tokens, and how many of them are read.

    Raises:
        OSError, ValueError, ModuleNotFoundError: as `read_captioned` and `kept`.
    """

    def __init__(self, recipe: ImageRecipe, images: CaptionedImages, encoders: Encoders, accelerator: Accelerator) -> None:
        self.recipe, self.images, self.encoders = recipe, images, encoders
        divisor = encoders.family.divisor
        buckets = buckets_of(recipe, divisor)
        with accelerator.main_process_first():
            self.prior = prior_of(recipe)
            self.cut_captions = encoders.cut(self.images.captions)
            if accelerator.is_main_process:
                self._tell(buckets)
            self.plan = Plan(
                self.images,
                self.prior,
                buckets,
                "center" if recipe.center_crop else "random",
                recipe.random_flip,
                recipe.seed or 0,
            )
            self.samples, self.texts = kept(
                self.plan,
                encoders,
                recipe.latents_dir or recipe.output_dir / "latents",
                latents=recipe.cache_latents,
                texts=not recipe.train_text_encoder,
                more=("", *([recipe.class_prompt] if recipe.class_prompt else [])),
                progress=accelerator.is_local_main_process,
            )

    @property
    def digests(self) -> dict[str, str]:
        """Return the digests of images and captions, and of the images of the class."""
        return digests_of(self.images, self.prior)

    def moments(self, batch: Mapping[str, Any]) -> Tensor:
        """Return (b, parts, 2, c, h, w) for a batch of samples, encoding them now if they are not cached."""
        if "moments" in batch:
            kept_already: Tensor = batch["moments"]
            return kept_already
        pixels = batch["pixels"]
        found = self.encoders.moments(pixels.flatten(0, 1))
        return found.reshape(*pixels.shape[:2], *found.shape[1:])

    def _tell(self, buckets: Sequence[Size]) -> None:
        """Report what was understood and which captions are truncated, and read every image."""
        for note in self.images.notes:
            print(note)
        count = len(self.images)
        if self.cut_captions:
            row, (tokens, most) = next(iter(self.cut_captions.items()))
            print(
                f"{len(self.cut_captions)} of {count} captions are longer than the {most} tokens that are read, and are cut "
                f"there; the first is number {row}, with {tokens} tokens"
            )
        if self.recipe.check_images:
            check_readable(self.images.__getitem__, count, "images")
            if self.prior is not None:
                check_readable(self.prior.__getitem__, len(self.prior), "class images")


def buckets_of(recipe: ImageRecipe, divisor: int) -> tuple[Size, ...]:
    """Return the shapes that images are brought to.

    Raises:
        ValueError: sides are not multiples of the divisor, or the shapes are invalid.
    """
    if recipe.aspect_ratio_buckets is not None:
        return parse_buckets(recipe.aspect_ratio_buckets, divisor)
    if recipe.resolution % divisor:
        raise ValueError(f"resolution must be a multiple of {divisor}, as the model's, got {recipe.resolution}")
    return buckets_for(recipe.resolution, divisor) if recipe.use_aspect_ratio_buckets else ((recipe.resolution,) * 2,)


def images_of(recipe: ImageRecipe) -> CaptionedImages:
    """Return the images to learn.

    Raises:
        OSError, ValueError, ModuleNotFoundError: as `read_captioned`.
    """
    return read_captioned(
        recipe.source,
        image_column=recipe.image_column,
        caption_column=recipe.caption_column,
        cache_dir=recipe.cache_dir,
        config=recipe.dataset_config_name,
        max_samples=recipe.max_train_samples,
        seed=recipe.seed or 0,
        caption=recipe.instance_prompt,
    )


def prior_of(recipe: ImageRecipe) -> CaptionedImages | None:
    """Return the images of the class, at most as many as requested; None without prior preservation.

    Raises:
        OSError, ValueError: as `read_captioned`.
    """
    if not recipe.with_prior_preservation:
        return None
    found = read_captioned(recipe.class_folder, caption=recipe.class_prompt, cache_dir=recipe.cache_dir)
    return found.some(recipe.num_class_images, recipe.seed or 0)


def digests_of(images: CaptionedImages, prior: CaptionedImages | None) -> dict[str, str]:
    """Return the digests by column, with "class" for the images of the class."""
    return images.digests | ({"class": next(iter(prior.digests.values()))} if prior is not None else {})
