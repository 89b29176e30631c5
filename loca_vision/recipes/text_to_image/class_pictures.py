"""Images of a class, drawn by the base itself (DreamBooth's prior preservation; Ruiz et al., 2023, section 3.3)."""

from __future__ import annotations

from accelerate import Accelerator
from tqdm import tqdm

from loca_vision.data.class_images import class_images
from loca_vision.data.sampling import stream_seed
from loca_vision.recipes.diffusion.drawing import pictures
from loca_vision.recipes.diffusion.models import Models
from loca_vision.recipes.text_to_image.recipe import ImageRecipe, picture_of

_DRAWN = 32  # a key of the stream of random numbers


def draw_class_images(recipe: ImageRecipe, models: Models, accelerator: Accelerator) -> None:
    """Draw those class images that are missing; each is a function of the seed and its number.

    Several processes share the work. After an interruption only what is missing is drawn.

    Raises:
        ValueError, OSError: the folder cannot be used.
    """
    if not recipe.with_prior_preservation:
        return
    folder = recipe.class_folder
    found = class_images(folder, recipe.num_class_images)
    accelerator.wait_for_everyone()  # before the first of the processes writes
    mine = found.missing[accelerator.process_index :: accelerator.num_processes]
    how = picture_of(recipe, models.family.call_settings())
    progress = None if accelerator.is_local_main_process and mine else True
    with tqdm(total=len(mine), desc="drawing class images", dynamic_ncols=True, disable=progress) as bar:
        for start in range(0, len(mine), recipe.sample_batch_size):
            numbers = mine[start : start + recipe.sample_batch_size]
            seeds = [stream_seed(recipe.seed or 0, number, _DRAWN) for number in numbers]
            with accelerator.autocast():
                drawn = pictures(models.pipe, recipe.class_prompt or "", seeds, how, scale=0)
            for number, image in zip(numbers, drawn, strict=True):
                found.write(number, image)
            bar.update(len(numbers))
    accelerator.wait_for_everyone()
