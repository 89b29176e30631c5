"""What autoencoder and text encoder make of pairs, computed once and kept on disk: the same bits as without a cache.

Images and texts are encoded one by one, so that what comes out depends on each alone and not on what shares its batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from loca_vision.pair_views import View, scaled
from loca_vision.pairs import Pair
from loca_vision.tensor_store import TensorStore

SHARD = 256  # tensors of a file: what a run that is killed may have to compute again


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
        """(n, 3, H, W) in [-1, 1] to (n, 2, c, h, w): mean and standard deviation of the latents, without scaling."""
        images = images.to(self.vae.device, self.vae.dtype)
        with torch.autocast(images.device.type, enabled=False):
            found = [self.vae.encode(image[None]).latent_dist for image in images]
        return torch.stack([torch.cat([one.mean, one.std]) for one in found])

    @torch.no_grad()
    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        """(n, tokens, width), of texts padded or cut to the tokenizer's length."""
        length = self.tokenizer.model_max_length
        given = self.tokenizer(list(prompts), max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        words = given.input_ids.to(self.text_encoder.device)
        with torch.autocast(words.device.type, enabled=False):
            return torch.cat([self.text_encoder(one[None])[0] for one in words])

    def batch(self, items: Mapping[str, Any]) -> Encoded:
        """A batch of `PairTensors`, encoded here and now: the very tensors that `EncodedPairs` would have for it."""
        texts = self.embeddings(items["prompt"])
        return {"original": self.moments(items["original"])[:, 0], "edited": self.moments(items["edited"]), "text": texts}


@dataclass(frozen=True)
class Row:
    """The keys of one pair: of original and edited image in every view, and of the text."""

    views: tuple[tuple[str, str], ...]
    text: str


class EncodedPairs(Dataset[Encoded]):
    """Pairs from the cache, each in the view that (seed, epoch, index) gives it."""

    def __init__(self, latents: TensorStore, texts: TensorStore, rows: Sequence[Row], view: View, seed: int) -> None:
        self.latents, self.texts, self.rows, self.view = latents, texts, rows, view
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0, before the DataLoader's iterator is made: its workers work on a copy of this set."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        row, drawn = self.rows[index], self.view.drawn(self.seed, self.epoch, index)
        original, edited = row.views[self.view.all.index(drawn)]
        return {"original": self.latents[original], "edited": self.latents[edited], "text": self.texts[row.text]}


def encoded(
    pairs: Dataset[Pair], view: View, encoders: Encoders, folder: Path, *, seed: int, progress: bool = True
) -> EncodedPairs:
    """The pairs, encoded in every view; what the folder has already is not computed again.

    Every image is decoded, since the key is what is in it. A file that is damaged is made anew. Of several processes let one
    come first: the others then find everything.

    Args:
        folder: of the cache; several data sets and models may share it.
        seed: of the views.

    Raises:
        ValueError: there is no end of views, as with random crops; a broken image; a file of other encoders in the folder.
        OSError: the cache cannot be read or written.
    """
    if not view.all:
        raise ValueError(f"crop={view.crop!r}: latents of random crops cannot be cached; use crop='center' or no cache")
    latents = _Filling(_store(folder, "latents", _identity(encoders.vae)))
    texts = _Filling(_store(folder, "texts", _identity(encoders.text_encoder) + _words(encoders.tokenizer)))
    count: Any = pairs
    rows = []
    try:
        for index in tqdm(range(len(count)), desc="encoding", dynamic_ncols=True, disable=None if progress else True):
            pair = pairs[index]
            views = tuple(_images(view.pixels(pair, drawn), encoders, latents) for drawn in view.all)
            text = texts.key(_key("text", pair.prompt.encode()), partial(_text, pair.prompt, encoders))
            rows.append(Row(views, text))
    finally:  # an interrupt too
        latents.flush()
        texts.flush()
    return EncodedPairs(latents.store, texts.store, rows, view, seed)


class _Filling:
    """A store, and what is to go into its next file."""

    def __init__(self, store: TensorStore) -> None:
        self.store = store
        self.waiting: dict[str, Tensor] = {}

    def key(self, key: str, make: Callable[[], Tensor]) -> str:
        """The key, after what it stands for is made, where it is missing."""
        if key not in self.store and key not in self.waiting:
            self.waiting[key] = make()
            if len(self.waiting) == SHARD:
                self.flush()
        return key

    def flush(self) -> None:
        if self.waiting:
            self.store.add(self.waiting)
            self.waiting = {}


def _images(pixels: Tensor, encoders: Encoders, latents: _Filling) -> tuple[str, str]:
    """The keys of both images in one view: of the original the mode alone is kept."""
    original, edited = pixels
    mode = latents.key(_image_key("mode", original), lambda: _moments(original, encoders)[0])
    return mode, latents.key(_image_key("moments", edited), lambda: _moments(edited, encoders))


def _moments(pixels: Tensor, encoders: Encoders) -> Tensor:
    return encoders.moments(scaled(pixels)[None])[0].cpu()


def _text(prompt: str, encoders: Encoders) -> Tensor:
    return encoders.embeddings([prompt])[0].cpu()


# Names


def _store(folder: Path, kind: str, identity: str) -> TensorStore:
    name = sha256(identity.encode()).hexdigest()[:16]
    return TensorStore(folder / f"{kind}-{name}", identity)


def _key(kind: str, data: bytes) -> str:
    return sha256(f"{kind} ".encode() + data).hexdigest()


def _image_key(kind: str, pixels: Tensor) -> str:
    return _key(f"{kind} {tuple(pixels.shape)}", pixels.numpy().tobytes())


def _identity(model: nn.Module) -> str:
    """Class, settings, dtype and weights of a model, of which the name it goes by is no part."""
    weights = sha256()
    for name, value in sorted(model.state_dict().items()):
        weights.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        data: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        weights.update(data)
    config: Any = model.config
    facts = dict(config) if isinstance(config, Mapping) else config.to_dict()
    kept = {name: value for name, value in facts.items() if not name.startswith("_") and "version" not in name}
    settings = sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
    return f"{type(model).__name__} {settings[:16]} {weights.hexdigest()}"


def _words(tokenizer: Any) -> str:
    """What texts become numbers by."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    inner = getattr(tokenizer, "backend_tokenizer", None)  # how words are split; the rest of it changes with every call
    splitting = json.loads(inner.to_str())["model"] if inner is not None else None
    about = [type(tokenizer).__name__, tokenizer.model_max_length, tokenizer.pad_token_id, vocabulary, splitting]
    return " " + sha256(json.dumps(about).encode()).hexdigest()
