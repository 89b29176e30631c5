"""Pictures of a pipeline in the benchmark's order of random numbers, and how near DINOv2 finds images to each other."""

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
    """The mean cosine of pairs of features: (n, d) and (n, d), of length 1, to a number in [-1, 1]."""
    return float((images * others).sum(dim=-1).mean())


def drift(images: Tensor, others: Tensor) -> float:
    """How far features went from those of the base: 0 for the same, 1 for opposite ones."""
    return (1 - similarity(images, others)) / 2


class Dino:
    """DINOv2 as a measure of images.

    Raises:
        OSError: there is no such model.
    """

    def __init__(self, place: str, device: torch.device) -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.processor = AutoImageProcessor.from_pretrained(place)
        self.model = AutoModel.from_pretrained(place, use_safetensors=True).to(device).eval()

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, d) of length 1: the state of the class token after the last layer, image by image."""
        device = self.model.device
        found = []
        for image in images:
            with torch.autocast(device.type, enabled=False):
                states = self.model(**self.processor(images=[image], return_tensors="pt").to(device)).last_hidden_state
            found.append(normalize(states[:, 0], dim=-1))
        return torch.cat(found)


class Drawer:
    """Draws prompts that were encoded once, so that no text encoder is needed afterwards.

    Args:
        pipe: on its device, but for the autoencoder, which comes for the time of `drawing`.
        texts: (1, tokens, d) of each prompt, that of `EMPTY` among them.
    """

    def __init__(self, pipe: Any, texts: Mapping[str, Tensor], protocol: Protocol) -> None:
        self.pipe, self.texts, self.protocol = pipe, dict(texts), protocol
        self.device: torch.device = next(pipe.transformer.parameters()).device

    def generator(self, seed: int) -> torch.Generator:
        """On the device, as the benchmark's: pictures of several prompts come from one after the other."""
        return torch.Generator(self.device).manual_seed(seed)

    def noise(self, generator: torch.Generator) -> Tensor:
        """What the pipeline would draw by itself to begin one picture with: (1, c, h, w)."""
        side = self.protocol.resolution // (2 * self.pipe.vae_scale_factor)
        shape = (1, self.pipe.transformer.config.in_channels, side, side)
        noise: Tensor = randn_tensor(shape, generator=generator, device=self.device, dtype=self.texts[EMPTY].dtype)
        return noise

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Pictures are drawn in here."""
        vae = self.pipe.vae
        before = next(vae.parameters()).device
        nn.Module.to(vae, self.device)
        try:
            with untouched(self.pipe):
                yield
        finally:
            nn.Module.to(vae, before)

    def picture(self, prompt: str, generator: torch.Generator, file: Path | None = None) -> Image.Image:
        """The next picture of a generator, RGB.

        Args:
            file: where it is kept. What is there already is read instead, while the generator goes on just the same.
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
    """Of every prompt in turn, all turns by one generator.

    Args:
        folder: where they are kept as `name`-01.png, -02.png and so on; None keeps none.
        repeats: turns.
    """
    generator, found = drawer.generator(seed), []
    with drawer.drawing():
        for number, prompt in enumerate(list(prompts) * repeats, start=1):
            file = folder / f"{name}{number:02d}.png" if folder else None
            found.append(drawer.picture(prompt, generator, file))
    return found


@torch.no_grad()
def encoded(pipe: Any, prompts: Sequence[str], protocol: Protocol) -> dict[str, Tensor]:
    """(1, tokens, d) of each prompt and of the empty one, on the CPU.

    Args:
        pipe: with its language model, on the device of that.
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
