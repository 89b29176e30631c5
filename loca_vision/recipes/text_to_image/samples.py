"""Samples of text-to-image training by position: an image in its bucket, and with DreamBooth also an image of the class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from loca_vision.data.buckets import BucketView, Drawn, Size, nearest_bucket
from loca_vision.data.captions import CaptionedImages
from loca_vision.data.pair_views import scaled
from loca_vision.recipes.diffusion.cache import Cache
from loca_vision.recipes.diffusion.encoders import Encoders

Item = dict[str, Any]
"""One sample, whose parts are the image and, with prior preservation, the image of the class:

pixels: (parts, 3, H, W) float32 in [-1, 1]; or moments: (parts, 2, c, h, w), if latents are cached.
sizes: (parts, 6) float32: original height and width, top and left of the crop, final height and width.
caption: the image's caption; and the tensors that it is encoded to, such as text: (tokens, width), if texts are cached.
"""
_CLASS = 12  # a key of the stream of random numbers: views of class images


@dataclass(frozen=True)
class Plan:
    """Which images a position stands for, and how they are viewed.

    An epoch has as many samples as the larger of the two sets has images; the other set is repeated, as in diffusers'
    DreamBooth scripts.

    Args:
        images: the images to learn.
        prior: images of the class; None without prior preservation.
        buckets: (height, width), at least one.
        crop, flip: as in `BucketView`.
        seed: the seed of the views.
    """

    images: CaptionedImages
    prior: CaptionedImages | None
    buckets: tuple[Size, ...]
    crop: Any
    flip: bool
    seed: int

    def __len__(self) -> int:
        return max(len(self.images), len(self.prior) if self.prior is not None else 0)

    def bucket(self, index: int) -> int:
        """Return the bucket of a sample: that of the image to learn."""
        if len(self.buckets) == 1:  # no header has to be read
            return 0
        return nearest_bucket(self.images.sizes[index % len(self.images)], self.buckets)

    def view(self, index: int) -> BucketView:
        """Return the view of both images of a sample."""
        return BucketView(self.buckets[self.bucket(index)], self.crop, self.flip)

    def parts(self, index: int) -> list[tuple[CaptionedImages, int, int]]:
        """Return each part's set, its position there, and the seed of its views."""
        found = [(self.images, index % len(self.images), self.seed)]
        if self.prior is not None:
            found.append((self.prior, index % len(self.prior), self.seed + _CLASS))
        return found

    def caption(self, index: int) -> str:
        """Return the caption of the image to learn."""
        return self.images.captions[index % len(self.images)]


def sizes_of(image_size: tuple[int, int], view: BucketView, drawn: Drawn) -> Tensor:
    """Return (6,): what Stable Diffusion XL is told about an image of that size (Podell et al., 2023, section 2.2)."""
    width, height = image_size
    return torch.tensor([height, width, *view.place(image_size, drawn), *view.size], dtype=torch.float32)


class PlainImages(Dataset[Item]):
    """Samples whose images are decoded on access, each in the view drawn by (seed, epoch, index).

    Args:
        plan: the plan of the samples.
        texts: the encoded captions; None if text encoders are trained.
    """

    def __init__(self, plan: Plan, texts: Texts | None) -> None:
        self.plan, self.texts, self.epoch = plan, texts, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from 0, before the DataLoader's iterator is made: its workers use a copy of this set."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Item:
        view, pixels, sizes = self.plan.view(index), [], []
        for images, position, seed in self.plan.parts(index):
            image, drawn = images[position].image, view.drawn(seed, self.epoch, index)
            pixels.append(scaled(view.pixels(image, drawn)))
            sizes.append(sizes_of(image.size, view, drawn))
        return _item(self.plan.caption(index), self.texts, pixels=torch.stack(pixels), sizes=torch.stack(sizes))


class KeptImages(Dataset[Item]):
    """The same samples with their latents from the cache.

    Args:
        plan: the plan of the samples.
        texts: as in `PlainImages`.
        cache: the cache of the latents.
        keys: the keys of the moments of every view, by set, position and bucket.
    """

    def __init__(self, plan: Plan, texts: Texts | None, cache: Cache, keys: dict[tuple[int, int, int], list[str]]) -> None:
        self.plan, self.texts, self.latents, self.keys, self.epoch = plan, texts, cache.latents.store, keys, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, as in `PlainImages`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Item:
        view, bucket, moments, sizes = self.plan.view(index), self.plan.bucket(index), [], []
        for part, (images, position, seed) in enumerate(self.plan.parts(index)):
            drawn = view.drawn(seed, self.epoch, index)
            moments.append(self.latents[self.keys[part, position, bucket][view.all.index(drawn)]])
            sizes.append(sizes_of(images.sizes[position], view, drawn))
        return _item(self.plan.caption(index), self.texts, moments=torch.stack(moments), sizes=torch.stack(sizes))


class Texts:
    """Captions as text encoders encode them, from a cache."""

    def __init__(self, cache: Cache, keys: dict[str, tuple[tuple[str, str], ...]]) -> None:
        self.store, self.keys = cache.words.store, keys

    def __getitem__(self, caption: str) -> dict[str, Tensor]:
        return {name: self.store[key] for name, key in self.keys[caption]}


def _item(caption: str, texts: Texts | None, **parts: Tensor) -> Item:
    return {"caption": caption, **parts, **(texts[caption] if texts is not None else {})}


def kept(
    plan: Plan, encoders: Encoders, folder: Path, *, latents: bool, texts: bool, more: Sequence[str] = (), progress: bool
) -> tuple[PlainImages | KeptImages, Texts | None]:
    """Return the samples, with latents and texts cached as requested; what the folder already has is not computed again.

    Args:
        folder: the folder of the cache.
        latents: cache the latents of the images in every view.
        texts: cache the encoded captions.
        more: texts to encode in addition to the captions.

    Returns:
        The samples, and the texts, including the additional ones.

    Raises:
        ValueError: an image is broken, or a file in the folder is of other encoders.
        OSError: the cache cannot be read or written.
    """
    if not latents and not texts:
        return PlainImages(plan, None), None
    cache = Cache(folder, encoders)
    keys: dict[tuple[int, int, int], list[str]] = {}
    words: dict[str, tuple[tuple[str, str], ...]] = {}
    try:
        if texts:
            different = list(dict.fromkeys([*more, *plan.images.captions]))
            words = {text: cache.text(text) for text in _bar(different, "encoding texts", progress)}
        if latents:
            for index in _bar(range(len(plan)), "encoding images", progress):
                _fill(keys, plan, index, cache)
    finally:  # also after an interrupt
        cache.flush()
    found = Texts(cache, words) if texts else None
    return (KeptImages(plan, found, cache, keys) if latents else PlainImages(plan, found)), found


def _fill(keys: dict[tuple[int, int, int], list[str]], plan: Plan, index: int, cache: Cache) -> None:
    """Add the keys of a sample's images in its bucket."""
    view, bucket = plan.view(index), plan.bucket(index)
    for part, (images, position, _) in enumerate(plan.parts(index)):
        if (part, position, bucket) not in keys:
            image = images[position].image
            keys[part, position, bucket] = [cache.moments(view.pixels(image, drawn)) for drawn in view.all]


def _bar(things: Any, said: str, progress: bool) -> Any:
    return tqdm(things, desc=said, dynamic_ncols=True, disable=None if progress else True)
