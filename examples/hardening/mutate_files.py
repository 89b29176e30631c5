"""Load thousands of damaged adapter files: each must be refused in one sentence, or load and give finite numbers.

A refused file must leave the model unchanged, bit for bit; so must a file that loads, once its adapter is removed. Every damage
is determined by a seed, so that a failure can be reproduced.

    python examples/hardening/mutate_files.py --count 10000
"""

from __future__ import annotations

import json
import random
import string
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from loca_vision import LoCAConfig, active_adapters, adapters, inject, load_adapter, remove, save_adapter
from loca_vision.formats.adapter_file import METADATA_KEY

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@dataclass
class Settings:
    """Load damaged adapter files into a tiny vision transformer."""

    count: int = 10_000
    """Number of files to try."""
    seed: int = 0
    """Seed of the first damage; the others use the following seeds."""


@dataclass
class Mutation:
    """One seeded change to a sound file."""

    seed: int

    def __call__(self, good: bytes) -> bytes:
        self.random = random.Random(self.seed)
        kind = self.random.choice([self.flip, self.cut, self.splice, self.header, self.header, self.value, self.data])
        return kind(good)

    def flip(self, raw: bytes) -> bytes:
        """Invert some bits."""
        changed = bytearray(raw)
        for _ in range(self.random.choice([1, 1, 2, 8, 64])):
            changed[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def cut(self, raw: bytes) -> bytes:
        """Keep the beginning or the end."""
        at = self.random.randrange(len(raw))
        return raw[:at] if self.random.random() < 0.5 else raw[at:]

    def splice(self, raw: bytes) -> bytes:
        """Copy a piece of the file to another position, overwriting or inserting."""
        start, at = self.random.randrange(len(raw)), self.random.randrange(len(raw))
        piece = raw[start : start + self.random.choice([1, 4, 8, 80, 1000])]
        return raw[:at] + piece + raw[at + self.random.choice([0, len(piece)]) :]

    def header(self, raw: bytes) -> bytes:
        """Edit the text of the header and keep its stated length correct."""
        text, data = split(raw)
        edited = text.decode()
        for _ in range(self.random.choice([1, 1, 2, 5])):
            at = self.random.randrange(len(edited))
            new = self.random.choice([*string.printable, "", "0", "-1", "1e9", "NaN", "null", "{}", "[]", "\\u0000", "é", '"'])
            edited = edited[:at] + new + edited[at + self.random.choice([0, 1, 1, 5]) :]
        return join(edited.encode(), data)

    def value(self, raw: bytes) -> bytes:
        """Replace one value in the metadata, at any depth."""
        others = [0, -1, 1, 2**31, 10**30, 0.5, "", "q", "../x", True, None, [], {}, [[]], {"": 0}, [48, 48], [1] * 99]
        text, data = split(raw)
        header = json.loads(text)
        metadata = json.loads(header["__metadata__"][METADATA_KEY])
        inside: Any = metadata
        while True:
            key = self.random.choice(list(inside) if isinstance(inside, dict) else list(range(len(inside))))
            if not isinstance(inside[key], (dict, list)) or not inside[key] or self.random.random() < 0.3:
                inside[key] = self.random.choice(others)
                break
            inside = inside[key]
        header["__metadata__"][METADATA_KEY] = json.dumps(metadata)
        return join(json.dumps(header).encode(), data)

    def data(self, raw: bytes) -> bytes:
        """Replace some bytes of the tensors with random ones."""
        text, data = split(raw)
        at = self.random.randrange(len(data))
        return join(text, data[:at] + self.random.randbytes(self.random.choice([1, 4, 40])) + data[at + 40 :])[: len(raw)]


def split(raw: bytes) -> tuple[bytes, bytes]:
    """Return the header and the data section of a safetensors file."""
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def tiny() -> nn.Module:
    torch.manual_seed(0)
    sizes: Any = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **sizes).eval()
    return model


def sound_file(folder: Path) -> bytes:
    """Return the bytes of an adapter file with random coefficients."""
    model = tiny()
    inject(model, LoCAConfig(n_components=20))
    for update in adapters(model).values():
        torch.nn.init.normal_(update.coefficients)
    return save_adapter(model, folder).read_bytes()


def facts(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def load_or_refuse(model: nn.Module, file: Path, before: dict[str, Tensor]) -> bool:
    """Load a file, remove its adapter again, and return whether it loaded or was refused.

    Raises:
        AssertionError: the error is not a single sentence, numbers are not finite, or the model has changed.
    """
    try:
        load_adapter(model, file)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ") and str(error).isprintable(), error
        loaded = False
    else:
        (name,) = active_adapters(model)
        updates = [update.delta() for update in adapters(model, name).values()]
        assert all(update.isfinite().all() for update in updates), "the update is not finite"
        ordinary = all(t.abs().max() < 1e6 for t in (*updates, *model.parameters()))  # large finite values can overflow later
        assert model(IMAGES).isfinite().all() or not ordinary, "the output is not finite"
        remove(model)
        loaded = True
    after = facts(model)
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items()), "changed"
    return loaded


def main() -> int:
    settings = tyro.cli(Settings, description=__doc__)
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        good, file, model = sound_file(Path(folder)), Path(folder) / "damaged.safetensors", tiny()
        before = facts(model)
        for seed in tqdm(range(settings.seed, settings.seed + settings.count), disable=None):
            file.write_bytes(Mutation(seed)(good))
            try:
                outcomes["loaded" if load_or_refuse(model, file, before) else "refused"] += 1
            except Exception as error:
                print(f"Mutation({seed}): {type(error).__name__}: {error}", file=sys.stderr)
                outcomes["failed"] += 1
                model = tiny()
    print(
        f"{settings.count} damaged files: {outcomes['refused']} refused in a sentence, {outcomes['loaded']} loaded, "
        f"{outcomes['failed']} failures"
    )
    return 1 if outcomes["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
