"""Draw pictures with the benchmark's order of random numbers, and measure the similarity of images with DINOv2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from loca_vision.data.images import as_png, open_image
from loca_vision.recipes.diffusion.drawing import untouched
from loca_vision.storage.atomic_file import write_atomically
from peft_image_gen_protocol import Protocol

EMPTY = ""  # the prompt that guidance leads away from


def similarity(images: Tensor, others: Tensor) -> float:
    """Return the mean cosine, in [-1, 1], of pairs of features (n, d) and (n, d) of length 1."""
    return float((images * others).sum(dim=-1).mean())


def drift(images: Tensor, others: Tensor) -> float:
    """Return how far features moved from those of the base: 0 for identical features, 1 for opposite ones."""
    return (1 - similarity(images, others)) / 2


class Dino:
    """DINOv2 as a measure of image similarity.

    Raises:
        OSError: the model does not exist or is not available.
    """

    def __init__(self, place: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.processor = AutoImageProcessor.from_pretrained(place)
        self.model = AutoModel.from_pretrained(place, use_safetensors=True).to(device).eval()

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return features (n, d) of length 1: the class token's state after the last layer, computed image by image."""
        device = self.model.device
        found = []
        for image in images:
            with torch.autocast(device.type, enabled=False):
                states = self.model(**self.processor(images=[image], return_tensors="pt").to(device)).last_hidden_state
            found.append(normalize(states[:, 0], dim=-1))
        return torch.cat(found)


class Drawer:
    """Draws pictures of encoded prompts, so that no text encoder is needed.

    Args:
        pipe: the pipeline on its device, except for its autoencoder, which is moved there only during `drawing`.
        texts: the embedding (1, tokens, d) of each prompt, including `EMPTY`.
    """

    def __init__(self, pipe: Any, texts: Mapping[str, Tensor], protocol: Protocol) -> None:
        self.pipe, self.texts, self.protocol = pipe, dict(texts), protocol
        self.device: torch.device = next(pipe.transformer.parameters()).device

    def generator(self, seed: int) -> torch.Generator:
        """Return a generator on the device, as in the benchmark: pictures of several prompts use it one after another."""
        return torch.Generator(self.device).manual_seed(seed)

    def noise(self, generator: torch.Generator) -> Tensor:
        """Draw the initial noise (1, c, h, w) of one picture, as the pipeline itself would."""
        side = self.protocol.resolution // (2 * self.pipe.vae_scale_factor)
        shape = (1, self.pipe.transformer.config.in_channels, side, side)
        noise: Tensor = randn_tensor(shape, generator=generator, device=self.device, dtype=self.texts[EMPTY].dtype)
        return noise

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Provide a context in which pictures are drawn."""
        vae = self.pipe.vae
        before = next(vae.parameters()).device
        nn.Module.to(vae, self.device)
        try:
            with untouched(self.pipe):
                yield
        finally:
            nn.Module.to(vae, before)

    def picture(self, prompt: str, generator: torch.Generator, file: Path | None = None) -> Image.Image:
        """Return a generator's next picture, RGB.

        Args:
            file: the file to save it in. If it exists, the picture is read from it, and the generator advances all the same.
        """
        noise = self.noise(generator)
        if file is not None and file.exists():
            return open_image(file)
        side = self.protocol.resolution
        image: Image.Image = self.pipe(
            prompt_embeds=self.texts[prompt].to(self.device),
            negative_prompt_embeds=self.texts[EMPTY].to(self.device),
            latents=noise,
            num_inference_steps=self.protocol.num_inference_steps,
            guidance_scale=self.protocol.guidance_scale,
            height=side,
            width=side,
        ).images[0]
        if file is not None:
            write_atomically(file, as_png(image))
        return image


def pictures(
    drawer: Drawer, prompts: Sequence[str], seed: int, folder: Path | None = None, *, name: str = "", repeats: int = 1
) -> list[Image.Image]:
    """Draw every prompt in turn, with one generator for all pictures.

    Args:
        folder: where pictures are saved as `name`01.png, `name`02.png and so on; with None, they are not saved.
        repeats: how often to go through the prompts.
    """
    generator, found = drawer.generator(seed), []
    with drawer.drawing():
        for number, prompt in enumerate(list(prompts) * repeats, start=1):
            file = folder / f"{name}{number:02d}.png" if folder else None
            found.append(drawer.picture(prompt, generator, file))
    return found


@torch.no_grad()
def encoded(pipe: Any, prompts: Sequence[str], protocol: Protocol) -> dict[str, Tensor]:
    """Return the embedding (1, tokens, d) of each prompt and of the empty prompt, on the CPU.

    Args:
        pipe: a pipeline with its language model, on whose device prompts are encoded.
    """
    device = next(pipe.text_encoder.parameters()).device
    found = {}
    with torch.autocast(device.type, enabled=False):
        for prompt in dict.fromkeys([*prompts, EMPTY]):
            text, _ = pipe.encode_prompt(
                prompt=prompt,
                device=device,
                max_sequence_length=protocol.max_sequence_length,
                text_encoder_out_layers=protocol.text_encoder_out_layers,
            )
            found[prompt] = text.to("cpu")
    return found
