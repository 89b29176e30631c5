"""What tests of the server share: a folder of adapters for a tiny classifier, images, requests without a network."""

from __future__ import annotations

import asyncio
import json
import struct
import zlib
from collections.abc import AsyncIterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from loca_vision import LoCAConfig, LoRAConfig, adapters, inject, load_adapter, save_adapter
from loca_vision.recipes.classification.models import ModelSpec, build_model
from loca_vision.recipes.classification.task import view_of
from refusals import Reply
from service import Call, Service
from serving_settings import Settings

Pairs = Sequence[tuple[str, str]]
MODEL = {"model": "test_vit", "weights": "none", "image_size": 32}


def settings(folder: Path, **more: Any) -> Settings:
    return Settings(folder, **MODEL | more)


def build(classes: int) -> Any:
    return build_model(ModelSpec("test_vit", classes, 32, "none"))


def write_adapter(path: Path, seed: int, classes: int = 3, config: Any = None) -> Path:
    """An adapter with random values, and a head."""
    model = build(classes)
    inject(model, config or (LoCAConfig(n_components=20) if seed % 2 else LoRAConfig(r=2)))
    torch.manual_seed(seed)
    for update in adapters(model).values():
        for parameter in update.trainable():
            torch.nn.init.normal_(parameter, std=10 if seed % 2 else 0.3)
    torch.nn.init.normal_(model.get_classifier().weight, std=0.1)
    return save_adapter(model, path)


def write_folder(folder: Path, count: int = 4) -> list[str]:
    """Adapters shop-0, shop-1... with 3, 4, 5... classes, in both layouts, and one that is broken."""
    for index in range(count):
        write_adapter(folder / (f"shop-{index}" if index % 2 else f"shop-{index}.safetensors"), index, 3 + index)
    sound = (folder / "shop-0.safetensors").read_bytes()
    (folder / "broken.safetensors").write_bytes(sound[: len(sound) // 2])
    return [f"shop-{index}" for index in range(count)]


def photo(seed: int, size: tuple[int, int] = (40, 50)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    data = BytesIO()
    image.save(data, kind, **more)
    return data.getvalue()


def alone(folder: Path, name: str, image: Image.Image) -> Tensor:
    """(C,): what a model with this adapter alone makes of the image."""
    model = build(2)
    file = folder / f"{name}.safetensors"
    load_adapter(model, file if file.is_file() else folder / name, trainable=False)
    with torch.no_grad():
        shares: Tensor = model(view_of("test_vit", "none", 32).plain(image)[None]).softmax(1)[0]
    return shares


def shares_of(body: bytes) -> Tensor:
    """(C,): the probabilities of an answer whose classes are numbers."""
    found = {int(one["class"]): one["probability"] for one in json.loads(body)["classes"]}
    return torch.tensor([found[index] for index in range(len(found))])


def png_that_claims(width: int, height: int) -> bytes:
    """A sound PNG but for its size, which its header claims."""
    raw = encoded(photo(0))
    header = b"IHDR" + struct.pack(">II", width, height) + raw[24:29]
    return raw[:12] + header + struct.pack(">I", zlib.crc32(header)) + raw[33:]


class Tally:
    """Counts in memory; `together` is how many requests make a batch."""

    def __init__(self, together: int = 1) -> None:
        self.together = together
        self.statuses: list[int] = []
        self.batches: list[int] = []
        self.held_bytes = self.loads = 0

    def request(self, status: int) -> None:
        self.statuses.append(status)

    def batch(self, size: int) -> None:
        self.batches.append(size)

    def loaded(self, adapters: int) -> None:
        self.loads += adapters

    def held(self, held_bytes: int) -> None:
        self.held_bytes = held_bytes

    def text(self) -> str:
        return "requests 1\n"


def gathering(tally: Tally) -> Any:
    """Makes of a function of a batch one of a single request: it runs once `tally.together` requests wait."""

    def batching(run: Any) -> Any:
        waiting: list[tuple[Any, asyncio.Future[Reply]]] = []

        async def one(asked: Any) -> Reply:
            future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            waiting.append((asked, future))
            if len(waiting) == tally.together:
                batch, waiting[:] = list(waiting), []
                replies = await run([asked for asked, _ in batch])
                for (_, other), reply in zip(batch, replies, strict=True):
                    other.set_result(reply)
            return await future

        return one

    return batching


def call(path: str, body: bytes = b"", *, method: str = "POST", query: Pairs = (), told: bool = True) -> Call:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    return Call(method, path, query, len(body) if told else None, pieces())


def replies(service: Service, *calls: Call) -> list[Reply]:
    """To requests that come at the same time."""

    async def together() -> list[Reply]:
        return list(await asyncio.gather(*map(service.reply, calls)))

    return asyncio.run(together())
