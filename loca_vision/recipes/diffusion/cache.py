"""Encodings of images and texts, computed once and kept on disk, with the same bits as when they are computed anew."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from hashlib import sha256
from pathlib import Path

from torch import Tensor

from loca_vision.data.pair_views import scaled
from loca_vision.recipes.diffusion.encoders import Encoders, identity_of
from loca_vision.recipes.diffusion.families.family import Texts
from loca_vision.storage.tensor_store import TensorStore

SHARD = 256  # tensors in a file: as many as a killed run may have to compute again


class Cache:
    """A folder of tensors that several data sets and models may share.

    Every image is read, since its key is made from its content. A damaged file is written again. With several processes, let
    one go first: the others then find everything.

    Raises:
        ValueError: a file in the folder is of other encoders.
        OSError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path, encoders: Encoders) -> None:
        self.encoders = encoders
        self.latents = _Filling(_store(folder, "latents", identity_of(encoders.vae)))
        self.words = _Filling(_store(folder, "texts", encoders.identity_of_texts()))

    def moments(self, pixels: Tensor) -> str:
        """Return the key of mean and deviation, (2, c, h, w), of the latents of bytes (3, H, W)."""
        return self.latents.key(_image_key("moments", pixels), lambda: self._moments(pixels))

    def mode(self, pixels: Tensor) -> str:
        """Return the key of the mean alone, (c, h, w)."""
        return self.latents.key(_image_key("mode", pixels), lambda: self._moments(pixels)[0])

    def text(self, prompt: str) -> tuple[tuple[str, str], ...]:
        """Return the keys of the tensors that a text is encoded to, each with its name."""
        made: Texts = {}

        def make(name: str) -> Tensor:
            made.update(made or self.encoders.texts([prompt]))
            return made[name][0].cpu()

        # the first keeps the name that it had when it was the only one
        kinds = {name: "text" if name == "text" else f"text {name}" for name in self.encoders.family.text_names}
        return tuple((name, self.words.key(_key(kind, prompt.encode()), partial(make, name))) for name, kind in kinds.items())

    def flush(self) -> None:
        """Write what is not yet written; also after an interrupt."""
        self.latents.flush()
        self.words.flush()

    def _moments(self, pixels: Tensor) -> Tensor:
        return self.encoders.moments(scaled(pixels)[None])[0].cpu()


class _Filling:
    """A store, and the tensors that will go into its next file."""

    def __init__(self, store: TensorStore) -> None:
        self.store = store
        self.waiting: dict[str, Tensor] = {}

    def key(self, key: str, make: Callable[[], Tensor]) -> str:
        """Return the key, after making the tensor if it is missing."""
        if key not in self.store and key not in self.waiting:
            self.waiting[key] = make()
            if len(self.waiting) == SHARD:
                self.flush()
        return key

    def flush(self) -> None:
        if self.waiting:
            self.store.add(self.waiting)
            self.waiting = {}


def _store(folder: Path, kind: str, identity: str) -> TensorStore:
    name = sha256(identity.encode()).hexdigest()[:16]
    return TensorStore(folder / f"{kind}-{name}", identity)


def _key(kind: str, data: bytes) -> str:
    return sha256(f"{kind} ".encode() + data).hexdigest()


def _image_key(kind: str, pixels: Tensor) -> str:
    return _key(f"{kind} {tuple(pixels.shape)}", pixels.numpy().tobytes())
