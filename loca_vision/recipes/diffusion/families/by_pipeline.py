"""The family of a pipeline, by the name of its class."""

from __future__ import annotations

from loca_vision.messages import nearest
from loca_vision.recipes.diffusion.families.family import Family
from loca_vision.recipes.diffusion.families.flux import Flux, Flux2
from loca_vision.recipes.diffusion.families.stable_diffusion import StableDiffusion, StableDiffusionXL
from loca_vision.recipes.diffusion.families.stable_diffusion_3 import StableDiffusion3

TEXT_TO_IMAGE: dict[str, type[Family]] = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "StableDiffusion3Pipeline": StableDiffusion3,
    "FluxPipeline": Flux,
    "Flux2Pipeline": Flux2,
    "Flux2KleinPipeline": Flux2,
}
EDITING: dict[str, type[Family]] = {
    "StableDiffusionInstructPix2PixPipeline": StableDiffusion,
    "StableDiffusionXLInstructPix2PixPipeline": StableDiffusionXL,
}


def family_of(name: str, place: str) -> type[Family]:
    """Return the family of a text-to-image pipeline.

    Args:
        name: the name of the pipeline's class.
        place: where the pipeline is from, for the error message.

    Raises:
        ValueError: it is not one of those that can be trained.
    """
    if name not in TEXT_TO_IMAGE:
        raise ValueError(
            f"{place}: a {name} cannot be trained here{nearest(name, TEXT_TO_IMAGE)}; those that can are "
            f"{', '.join(TEXT_TO_IMAGE)}"
        )
    return TEXT_TO_IMAGE[name]
