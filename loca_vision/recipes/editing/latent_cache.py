"""Pairs encoded by autoencoder and text encoders, from a cache on disk or during training, with the same bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from loca_vision.data.pair_views import View
from loca_vision.data.pairs import Pair
from loca_vision.recipes.diffusion.cache import Cache
from loca_vision.recipes.diffusion.encoders import Encoders

Encoded = dict[str, Tensor]
"""One pair, or several with a leading axis; in the dtypes of the encoders, and on the CPU if they come from a cache.

original: (c, h, w), the mode of the latent distribution, as the UNet sees it: not scaled.
edited: (2, c, h, w), its mean and standard deviation, to be sampled from and then scaled.
text: (tokens, width), and whatever else the family has for a text, such as pooled: (width,).
"""


@dataclass(frozen=True)
class Row:
    """The keys of one pair: of original and edited image in every view, and of the encoded text."""

    views: tuple[tuple[str, str], ...]
    text: tuple[tuple[str, str], ...]


class EncodedPairs(Dataset[Encoded]):
    """Pairs from the cache, each in the view drawn by (seed, epoch, index)."""

    def __init__(self, cache: Cache, rows: Sequence[Row], view: View, seed: int) -> None:
        self.latents, self.texts, self.rows, self.view = cache.latents.store, cache.words.store, rows, view
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, before the DataLoader's iterator is made: its workers use a copy of this set."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        row, drawn = self.rows[index], self.view.drawn(self.seed, self.epoch, index)
        original, edited = row.views[self.view.all.index(drawn)]
        texts = {name: self.texts[key] for name, key in row.text}
        return {"original": self.latents[original], "edited": self.latents[edited], **texts}


def encoded(
    pairs: Dataset[Pair], view: View, encoders: Encoders, folder: Path, *, seed: int, progress: bool = True
) -> EncodedPairs:
    """Return the pairs, encoded in every view; what the folder already has is not computed again.

    Args:
        folder: the folder of the cache.
        seed: the seed of the views.

    Raises:
        ValueError: the views are not countable, as with random crops; an image is broken; or a file in the folder is of other
            encoders.
        OSError: the cache cannot be read or written.
    """
    if not view.all:
        raise ValueError(f"crop={view.crop!r}: latents of random crops cannot be cached; use crop='center' or no cache")
    cache = Cache(folder, encoders)
    count: Any = pairs
    rows = []
    try:
        for index in tqdm(range(len(count)), desc="encoding", dynamic_ncols=True, disable=None if progress else True):
            pair = pairs[index]
            views = tuple(_keys(view.pixels(pair, drawn), cache) for drawn in view.all)
            rows.append(Row(views, cache.text(pair.prompt)))
    finally:  # also after an interrupt
        cache.flush()
    return EncodedPairs(cache, rows, view, seed)


def encoded_now(items: Mapping[str, Any], encoders: Encoders) -> Encoded:
    """Encode a batch of `PairTensors` to the very tensors that `EncodedPairs` would have for it."""
    texts = encoders.texts(items["prompt"])
    return {"original": encoders.moments(items["original"])[:, 0], "edited": encoders.moments(items["edited"]), **texts}


def _keys(pixels: Tensor, cache: Cache) -> tuple[str, str]:
    """Return the keys of both images in one view; for the original only the mode is kept."""
    original, edited = pixels
    return cache.mode(original), cache.moments(edited)
