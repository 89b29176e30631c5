"""Autoencoder and text encoder: what a UNet is given of images and texts, and what they are to be known by.

Images and texts are encoded one by one, so that what comes out depends on each alone and not on what shares its batch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypedDict

import torch
from torch import Tensor, nn


class Encoded(TypedDict):
    """One pair, or several with an axis in front; in the dtypes of the encoders, on the CPU where they come from a cache.

    original: (c, h, w), the mode of the latent distribution, as the UNet sees it: not scaled.
    edited: (2, c, h, w), mean and standard deviation of it, to be sampled from, and scaled then.
    text: (tokens, width).
    """

    original: Tensor
    edited: Tensor
    text: Tensor


@dataclass(frozen=True)
class Encoders:
    """The frozen parts of a pipeline that turn images and texts into what the UNet takes.

    Models are put into evaluation mode, and compute in their own dtypes whatever autocast is on: nothing but their input
    decides what comes out.
    """

    vae: Any
    text_encoder: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        for model in (self.vae, self.text_encoder):
            model.eval()

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """(n, 3, H, W) in [-1, 1] to (n, 2, c, h, w): mean and standard deviation of the latents, without scaling.

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
    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        """(n, tokens, width), of texts padded or cut to the tokenizer's length."""
        length = self.tokenizer.model_max_length
        given = self.tokenizer(list(prompts), max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        words = given.input_ids.to(self.text_encoder.device)
        with torch.autocast(words.device.type, enabled=False):
            return torch.cat([self.text_encoder(one[None])[0] for one in words])

    @property
    def most_tokens(self) -> int:
        """Of a text, with the marks of its beginning and end."""
        return int(self.tokenizer.model_max_length)

    def cut(self, prompts: Sequence[str]) -> dict[int, int]:
        """The texts that `embeddings` cuts off: how many tokens each has, by its position."""
        different = list(dict.fromkeys(prompts))
        tokens = self.tokenizer(different, truncation=False, verbose=False).input_ids if different else []
        lengths = dict(zip(different, map(len, tokens), strict=True))
        return {position: lengths[text] for position, text in enumerate(prompts) if lengths[text] > self.most_tokens}

    def batch(self, items: Mapping[str, Any]) -> Encoded:
        """A batch of `PairTensors`, encoded here and now: the very tensors that `EncodedPairs` would have for it."""
        texts = self.embeddings(items["prompt"])
        return {"original": self.moments(items["original"])[:, 0], "edited": self.moments(items["edited"]), "text": texts}


def identity_of(model: nn.Module) -> str:
    """Class, settings, dtype, weights and, where it works in tiles, their sizes; the name a model goes by is no part of it."""
    weights = sha256()
    for name, value in sorted(model.state_dict().items()):
        weights.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        data: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        weights.update(data)
    config: Any = model.config
    facts = dict(config) if isinstance(config, Mapping) else config.to_dict()
    kept = {name: value for name, value in facts.items() if not name.startswith("_") and "version" not in name}
    if getattr(model, "use_tiling", False):  # which changes what comes out of large images
        kept |= {name: value for name, value in vars(model).items() if name.startswith("tile_")}
    settings = sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
    return f"{type(model).__name__} {settings[:16]} {weights.hexdigest()}"


def words_of(tokenizer: Any) -> str:
    """What texts become numbers by."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    inner = getattr(tokenizer, "backend_tokenizer", None)  # how words are split; the rest of it changes with every call
    splitting = json.loads(inner.to_str())["model"] if inner is not None else None
    about = [type(tokenizer).__name__, tokenizer.model_max_length, tokenizer.pad_token_id, vocabulary, splitting]
    return " " + sha256(json.dumps(about).encode()).hexdigest()
