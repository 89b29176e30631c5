"""Models with adapters of every kind, and what each sample of a batch answers with its own adapters alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision import (
    AdapterConfig,
    FourierFTConfig,
    LoCAConfig,
    LoRAConfig,
    SDCTFTConfig,
    SeLoRAConfig,
    WaveFTConfig,
    adapters,
    inject,
    set_adapters,
)
from loca_vision.methods.fourierft import FourierSpectrum

Entry = str | Mapping[str, float] | None

KINDS: dict[str, AdapterConfig] = {
    "loca": LoCAConfig(n_components=30),
    "sdctft": SDCTFTConfig(n_components=20),
    "fourierft": FourierFTConfig(n_components=20),
    "lora": LoRAConfig(r=2),
    "dora": LoRAConfig(r=2, use_dora=True),
    "selora": SeLoRAConfig(r=4),
    "waveft": WaveFTConfig(n_components=20, scale=1.0),
}
ENTRIES: list[Entry] = [
    "loca",
    "sdctft",
    None,
    {"loca": 0.5, "lora": -0.7, "fourierft": 1.2},
    "fourierft",
    "dora",
    "selora",
    "waveft",
    {},
]


def with_adapters(model: nn.Module, configs: Mapping[str, AdapterConfig] = KINDS) -> nn.Module:
    """Adapters that change what the model answers, each with a head of its own where it has one."""
    for name, config in configs.items():
        inject(model, config, name)
        stir(model, name)
        head: Any = model.get_submodule("head") if "head" in dict(model.named_children()) else None
        if isinstance(head, nn.Linear):
            nn.init.normal_(head.weight, std=0.1)
    return model


def stir(model: nn.Module, name: str) -> None:
    for update in adapters(model, name).values():
        for key, parameter in update.named_parameters():
            if key != "locations" and key != "magnitude":
                norm = math.sqrt(2 * math.prod(update.shape)) / 300 if isinstance(update, FourierSpectrum) else 1.0
                nn.init.normal_(parameter, std=0.3 * norm)


def as_mapping(entry: Entry) -> dict[str, float]:
    return {} if entry is None else {entry: 1.0} if isinstance(entry, str) else dict(entry)


def one_by_one(model: nn.Module, x: Tensor, entries: Sequence[Entry], call: Callable[..., Tensor] | None = None) -> Tensor:
    """The oracle: a call of its own for every sample, with its adapters alone."""
    found = []
    for index, entry in enumerate(entries):
        own = as_mapping(entry)
        set_adapters(model, list(own), list(own.values()))
        found.append((call or model)(x[index : index + 1]))
    return torch.cat(found)
