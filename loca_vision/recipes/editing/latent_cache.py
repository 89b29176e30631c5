"""What autoencoder and text encoder make of pairs, computed once and kept on disk: the same bits as without a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from loca_vision.data.pair_views import View, scaled
from loca_vision.data.pairs import Pair
from loca_vision.recipes.editing.encoders import Encoded, Encoders, identity_of, words_of
from loca_vision.storage.tensor_store import TensorStore

SHARD = 256  # tensors of a file: what a run that is killed may have to compute again


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
    latents = _Filling(_store(folder, "latents", identity_of(encoders.vae)))
    texts = _Filling(_store(folder, "texts", identity_of(encoders.text_encoder) + words_of(encoders.tokenizer)))
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
