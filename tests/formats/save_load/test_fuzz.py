"""save_adapter and load_adapter: fuzzing."""

from __future__ import annotations

import os
import random
import string
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from loca_vision import active_adapters, adapters, load_adapter, remove
from support.adapter_files import NAME, about, assert_same, join, output, split


@dataclass
class Mutation:
    """One seeded change of a good file."""

    seed: int

    def __call__(self, good: bytes) -> bytes:
        self.random = random.Random(self.seed)
        kind = self.random.choice([self.flip, self.cut, self.splice, self.header, self.header, self.value, self.data])
        return kind(good)

    def flip(self, raw: bytes) -> bytes:
        changed = bytearray(raw)
        for _ in range(self.random.choice([1, 1, 2, 8, 64])):
            changed[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
        return bytes(changed)

    def cut(self, raw: bytes) -> bytes:
        at = self.random.randrange(len(raw))
        return raw[:at] if self.random.random() < 0.5 else raw[at:]

    def splice(self, raw: bytes) -> bytes:
        """Put some piece of the file in some other place, over what is there or between."""
        start, at = self.random.randrange(len(raw)), self.random.randrange(len(raw))
        piece = raw[start : start + self.random.choice([1, 4, 8, 80, 1000])]
        return raw[:at] + piece + raw[at + self.random.choice([0, len(piece)]) :]

    def header(self, raw: bytes) -> bytes:
        """Edit the text of the header, whose length is then right."""
        text, data = split(raw)
        edited = text.decode()
        for _ in range(self.random.choice([1, 1, 2, 5])):
            at = self.random.randrange(len(edited))
            new = self.random.choice([*string.printable, "", "0", "-1", "1e9", "NaN", "null", "{}", "[]", "\\u0000", "é", '"'])
            edited = edited[:at] + new + edited[at + self.random.choice([0, 1, 1, 5]) :]
        return join(edited.encode(), data)

    def value(self, raw: bytes) -> bytes:
        """Exchange one value in the metadata, at any depth, for another."""
        others = [0, -1, 1, 2**31, 10**30, 0.5, "", "q", "../x", True, None, [], {}, [[]], {"": 0}, [48, 48], [1] * 99]

        def change(metadata: dict[str, Any]) -> None:
            place: Any = metadata
            while True:
                keys = list(place) if isinstance(place, dict) else list(range(len(place)))
                key = self.random.choice(keys)
                if not isinstance(place[key], (dict, list)) or not place[key] or self.random.random() < 0.3:
                    place[key] = self.random.choice(others)
                    return
                place = place[key]

        try:
            return about(change)(raw)
        except AssertionError:  # it exchanged a value for its equal
            return raw

    def data(self, raw: bytes) -> bytes:
        """Any bytes for some of the data."""
        text, data = split(raw)
        at = self.random.randrange(len(data))
        return join(text, data[:at] + self.random.randbytes(self.random.choice([1, 4, 40])) + data[at + 40 :])[: len(raw)]


def load_or_refuse(model: nn.Module, file: Path, before: dict[str, Any]) -> bool:
    """Whether the file was loaded; the model is then taken back to what it was."""
    try:
        load_adapter(model, file)
    except ValueError as error:
        assert str(error).startswith(f"{file}: ") and str(error).isprintable()
        assert_same(model, before)
        return False
    names = list(active_adapters(model))
    updates = [spectrum.delta() for spectrum in adapters(model, names[0]).values()]
    assert len(names) == 1 and all(update.isfinite().all() for update in updates)
    ordinary = all(t.abs().max() < 1e6 for t in (*updates, *model.parameters()))  # what is finite can overflow further on
    assert output(model).isfinite().all() or not ordinary
    remove(model)
    assert_same(model, before)
    return True


def test_mutations_are_loaded_or_refused(good: bytes, model: nn.Module, untouched: dict[str, Any], tmp_path: Path) -> None:
    file, loaded = tmp_path / NAME, 0
    for seed in range(int(os.environ.get("LOCA_VISION_MUTATIONS", "300"))):
        file.write_bytes(Mutation(seed)(good))
        try:
            loaded += load_or_refuse(model, file, untouched)
        except BaseException as error:
            raise AssertionError(f"Mutation({seed})") from error
    assert loaded > 0, "no mutation left the file sound: nothing but refusals was tried"
