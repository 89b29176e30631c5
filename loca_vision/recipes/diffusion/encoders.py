"""Autoencoder and text encoders: how images and texts are encoded for a denoiser, and how the encoders are identified.

Images and texts are encoded one by one, so that each result depends only on its input and not on the rest of the batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.recipes.diffusion.families.family import Family, Texts


class Encoders:
    """The frozen parts of a pipeline that turn images and texts into what the denoiser takes.

    Models are put into evaluation mode and compute in their own dtypes whether or not autocast is on, so that the result
    depends on nothing but their input.

    Attributes:
        vae: the autoencoder.
        family: the family of the pipeline, which knows the text encoders and how to call them.
    """

    def __init__(self, family: Family) -> None:
        self.family, self.vae = family, family.pipe.vae
        self.resting: list[nn.Module] = []
        for model in self.models():
            model.eval()

    def models(self) -> list[nn.Module]:
        """Autoencoder and text encoders, without those that the pipeline was loaded without."""
        names = ("vae", *self.family.text_encoders)
        found = (getattr(self.family.pipe, name, None) for name in names)
        return [model for model in found if model is not None]

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode (n, 3, H, W) in [-1, 1] to (n, 2, c, h, w): mean and standard deviation of the latents, without scaling.

        Raises:
            ValueError: they are not finite, as from an autoencoder that overflows float16.
        """
        images = images.to(self.vae.device, self.vae.dtype)
        with torch.autocast(images.device.type, enabled=False):
            distributions = [self.vae.encode(image[None]).latent_dist for image in images]
        latents = torch.stack([torch.cat([one.mean, one.std]) for one in distributions])
        if not latents.isfinite().all():
            raise ValueError(
                f"the latents of an image are not finite in {latents.dtype}: bring the autoencoder to torch.float32, "
                "or train in bf16"
            )
        return latents

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Texts:
        """Return the encoded texts for the denoiser, by name: each (n, ...)."""
        with torch.autocast(self.vae.device.type, enabled=False):
            found = [self.family.texts([prompt]) for prompt in prompts]
        return {name: torch.cat([one[name] for one in found]) for name in found[0]}

    def cut(self, prompts: Sequence[str]) -> dict[int, tuple[int, int]]:
        """Return, for texts whose end is not read, the number of tokens and how many of them are read, by position."""
        different = list(dict.fromkeys(prompts))
        cut: dict[str, tuple[int, int]] = {}
        for tokenizer, most in self.family.lengths().items():
            counts = self.family.token_counts(tokenizer, different)
            cut |= {text: (count, most) for text, count in zip(different, counts, strict=True) if count > most}
        return {position: cut[text] for position, text in enumerate(prompts) if text in cut}

    def identity_of_texts(self) -> str:
        """Return what identifies the encoding of texts."""
        pipe = self.family.pipe
        parts = [
            identity_of(model) + words_of(getattr(pipe, tokenizer))
            for name, tokenizer in self.family.text_encoders.items()
            if (model := getattr(pipe, name, None)) is not None
        ]
        return " ".join([*parts, *([str(self.family.length)] if self.family.length else [])])

    def rest(self, *, images: bool, texts: bool) -> None:
        """Move encoders off the device once everything is encoded, so that their memory is free for training.

        Args:
            images: move the autoencoder.
            texts: move the text encoders.
        """
        encoders = self.models()
        self.resting = ([self.vae] if images else []) + ([one for one in encoders if one is not self.vae] if texts else [])
        self._move("cpu")

    @contextmanager
    def back(self, device: torch.device | str) -> Iterator[None]:
        """Move those encoders back to the device inside the `with`, as for pictures."""
        self._move(device)
        try:
            yield
        finally:
            self._move("cpu")

    def _move(self, device: torch.device | str) -> None:
        for model in self.resting:
            nn.Module.to(model, device)


def identity_of(model: nn.Module) -> str:
    """Return a text that identifies class, settings, dtype, weights and any tile sizes, but not the name the model goes by."""
    weights = sha256()
    for name, value in sorted(model.state_dict().items()):
        weights.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        data: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        weights.update(data)
    config: Any = model.config
    facts = dict(config) if isinstance(config, Mapping) else config.to_dict()
    kept = {name: value for name, value in facts.items() if not name.startswith("_") and "version" not in name}
    if getattr(model, "use_tiling", False):  # tiling changes the result for large images
        kept |= {name: value for name, value in vars(model).items() if name.startswith("tile_")}
    settings = sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
    return f"{type(model).__name__} {settings[:16]} {weights.hexdigest()}"


def words_of(tokenizer: Any) -> str:
    """Return what determines how texts become numbers; for a processor, that of its tokenizer."""
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    vocabulary = sorted(tokenizer.get_vocab().items())
    inner = getattr(tokenizer, "backend_tokenizer", None)  # it splits words; the rest of the tokenizer changes with every call
    splitting = json.loads(inner.to_str())["model"] if inner is not None else None
    about = [type(tokenizer).__name__, tokenizer.model_max_length, tokenizer.pad_token_id, vocabulary, splitting]
    about += [template] if (template := getattr(tokenizer, "chat_template", None)) else []
    return " " + sha256(json.dumps(about).encode()).hexdigest()
