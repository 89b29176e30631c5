"""The pairs that InstructPix2Pix is trained on, encoded in a cache or during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from accelerate import Accelerator

from loca_vision.data.check_images import check_readable
from loca_vision.data.pair_views import PairTensors, View
from loca_vision.data.pairs import Columns, Pairs, read_pairs
from loca_vision.recipes.diffusion.encoders import Encoders
from loca_vision.recipes.diffusion.task import Samples
from loca_vision.recipes.editing.latent_cache import Encoded, encoded, encoded_now
from loca_vision.recipes.editing.recipe import EditRecipe

Encode = Callable[[Mapping[str, Any]], Encoded]


class EditData:
    """Pairs to train on.

    Args:
        recipe: a settled recipe, with its seed.
        encoders: the encoders of the pipeline.
        accelerator: of several processes the first fills the cache, and the others find everything there.

    Attributes:
        items: the data set, of pairs or of their cached encodings; `set_epoch` changes their views.
        encode: turns a batch into what the UNet takes.
        cut_prompts: for instructions that are too long, by row: the number of tokens, and how many of them are read.

    Raises:
        OSError, ValueError, ModuleNotFoundError: as `read_pairs` and `encoded`.
    """

    def __init__(self, recipe: EditRecipe, encoders: Encoders, accelerator: Accelerator) -> None:
        seed = recipe.seed or 0
        view = View(recipe.resolution, "center" if recipe.center_crop else "random", recipe.random_flip)
        with accelerator.main_process_first():
            self.pairs = pairs_of(recipe, "train", recipe.max_train_samples)
            self.cut_prompts = encoders.cut(self.pairs.prompts)
            if accelerator.is_main_process:
                self._check(recipe, encoders)
            self.items: Samples
            self.encode: Encode
            if recipe.cache_latents:
                folder = recipe.latents_dir or recipe.output_dir / "latents"
                progress = accelerator.is_local_main_process
                self.items = encoded(self.pairs, view, encoders, folder, seed=seed, progress=progress)
                self.encode = _as_it_is
            else:
                self.items = PairTensors(self.pairs, view, seed)
                self.encode = partial(encoded_now, encoders=encoders)

    def _check(self, recipe: EditRecipe, encoders: Encoders) -> None:
        """Report which instructions are truncated, and read every pair."""
        if self.cut_prompts:
            row, (tokens, most) = next(iter(self.cut_prompts.items()))
            print(
                f"{len(self.cut_prompts)} of {len(self.pairs)} instructions are longer than the {most} tokens "
                f"that the text encoder reads, and are cut there; the first is in row {row}, with {tokens} tokens"
            )
        if recipe.check_images:
            check_readable(self.pairs.__getitem__, len(self.pairs), "pairs")


def pairs_of(recipe: EditRecipe, split: str, most: int | None) -> Pairs:
    """Return one split of the recipe's data set.

    Raises:
        OSError, ValueError, ModuleNotFoundError: as `read_pairs`.
    """
    return read_pairs(
        recipe.train_data_dir or recipe.dataset_name or "",
        columns=Columns(recipe.original_image_column, recipe.edit_prompt_column, recipe.edited_image_column),
        split=split,
        cache_dir=recipe.cache_dir,
        config=recipe.dataset_config_name,
        max_samples=most,
        seed=recipe.seed or 0,
    )


def _as_it_is(batch: Mapping[str, Any]) -> Encoded:
    return dict(batch)
