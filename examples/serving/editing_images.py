"""Edit images for many adapters in one batch: one InstructPix2Pix pipeline, and each request's own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from adapter_shelf import AdapterShelf
from image_bodies import ImageLimits, image_of
from loca_vision.data.images import as_png
from loca_vision.data.pair_sources import is_missing
from loca_vision.messages import one_line
from loca_vision.pipeline.components import models_in
from loca_vision.recipes.editing.edit import Sampling, square
from refusals import Refusal, Reply, each
from request_options import Options
from serving_settings import Settings

_SIZE = 512  # of Stable Diffusion 1
_LONGEST_PROMPT = 1000


@dataclass(frozen=True)
class EditAsked:
    """A request for one edit; its photograph is a square of the server's size."""

    adapter: str
    photo: Image.Image
    prompt: str
    seed: int
    sampling: Sampling


class Editor:
    """Answers batches of edits, each with its own adapter; those with the same steps and guidance are drawn together.

    Raises:
        ValueError, OSError: the pipeline is not available, or does not accept the image size.
    """

    route = "edit"

    def __init__(self, settings: Settings) -> None:
        assert settings.pipeline is not None
        self.size, self.most_steps = settings.image_size or _SIZE, settings.most_steps
        self.limits = ImageLimits(settings.most_bytes, settings.most_pixels)
        self.pipe = _pipeline(settings.pipeline).to("cuda" if settings.gpus_per_replica else "cpu")
        self.pipe.set_progress_bar_config(disable=True)
        if self.size % self.pipe.vae_scale_factor:
            raise ValueError(f"image_size={self.size}: expected a multiple of {self.pipe.vae_scale_factor} for this pipeline")
        self.shelf = AdapterShelf(settings.adapters, settings.capacity, self.pipe, list(models_in(self.pipe).values()))

    def asked(self, adapter: str, body: bytes, options: Options) -> EditAsked:
        """Check a request and prepare its image; may run in parallel with other requests.

        Raises:
            Refusal: the image or an option is invalid.
        """
        prompt = options.text("prompt", _LONGEST_PROMPT)
        seed = options.count("seed", 0, least=0, most=2**63 - 1)
        sampling = Sampling(
            options.count("steps", min(20, self.most_steps), most=self.most_steps),
            options.number("guidance_scale", 7.0, least=1.0, most=50.0),
            options.number("image_guidance_scale", 1.5, least=1.0, most=50.0),
        )
        options.finish()
        return EditAsked(adapter, square(image_of(body, self.limits), self.size), prompt, seed, sampling)

    def answers(self, asked: Sequence[EditAsked]) -> list[Reply | Exception]:
        """Return the answer to each request, or the error that prevented it."""
        found: dict[int, Reply | Exception] = {}
        for sampling in dict.fromkeys(one.sampling for one in asked):
            group = [index for index, one in enumerate(asked) if one.sampling == sampling]
            found |= zip(group, each([asked[index] for index in group], self._together), strict=True)
        return [found[index] for index in range(len(asked))]

    def _together(self, asked: Sequence[EditAsked]) -> list[Reply]:
        for name in dict.fromkeys(one.adapter for one in asked):
            self.shelf.ready(name)
        sampling = asked[0].sampling
        try:
            drawn = self.pipe(
                [one.prompt for one in asked],
                image=[one.photo for one in asked],
                loca_adapters=[one.adapter for one in asked],
                generator=[torch.Generator().manual_seed(one.seed) for one in asked],
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance_scale,
                image_guidance_scale=sampling.image_guidance_scale,
            )
        except (ValueError, OSError) as error:
            raise self.shelf.refusal(error) from None
        flagged = getattr(drawn, "nsfw_content_detected", None) or [False] * len(asked)
        return [_reply(image, hidden) for image, hidden in zip(drawn.images, flagged, strict=True)]


def _reply(image: Image.Image, hidden: bool) -> Reply | Any:
    if hidden:  # only this request is refused: its neighbours keep their edits
        return Refusal(422, "the pipeline's safety checker does not show this edit").reply()
    return Reply(200, as_png(image.convert("RGB")), "image/png")


def _pipeline(source: str) -> Any:
    """Load the pipeline with all its components, including any safety checker, from safetensors files only.

    Raises:
        OSError: the pipeline is not available.
    """
    from diffusers import StableDiffusionInstructPix2PixPipeline

    if is_missing(source):
        raise OSError(f"pipeline={source!r}: there is no such folder, and the hub names them user/name")
    try:
        return StableDiffusionInstructPix2PixPipeline.from_pretrained(source, use_safetensors=True)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:  # diffusers raises several kinds
        raise OSError(f"pipeline={source!r}: it cannot be loaded as InstructPix2Pix ({one_line(error, 300)})") from error
