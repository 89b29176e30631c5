"""Models, adapters and ways to damage adapter files for the tests in formats/save_load/."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from loca_vision import LoCAConfig, active_adapters, adapters, inject
from loca_vision.formats.adapter_file import METADATA_KEY
from loca_vision.model.traversal import own_parameters
from support.copies import fresh

CONFIG = LoCAConfig(n_components=20, scale=2.0)


PROJECTIONS = ("blocks.0.attn.q", "blocks.0.attn.v", "blocks.1.attn.q", "blocks.1.attn.v")


Q = PROJECTIONS[0]


IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


NAME = "adapter.safetensors"


def tiny(classes: int = 3, seed: int = 0, depth: int = 2) -> nn.Module:
    """A tiny model whose weights depend only on the arguments, like those of a pretrained model, except for the head."""
    made, state = _made(classes, seed, depth)
    torch.default_generator.set_state(state)
    return fresh(made)


@cache
def _made(classes: int, seed: int, depth: int) -> tuple[nn.Module, Tensor]:
    """The model, and how making it leaves the generator."""
    torch.manual_seed(seed)
    sizes = {"embed_dim": 48, "depth": depth, "num_heads": 3, "patch_size": 8, "img_size": 32}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **sizes).eval()
    return model, torch.default_generator.get_state()


@torch.no_grad()
def train(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Change everything that training could change: coefficients, locations and all other trainable tensors."""
    torch.manual_seed(seed)
    for spectrum in adapters(model, name).values():
        spectrum.coefficients.normal_()
        spectrum.locations.copy_(torch.rand_like(spectrum.locations))
    for parameter in own_parameters(model).values():
        if parameter.requires_grad:
            parameter.normal_()


def trained(config: LoCAConfig = CONFIG, classes: int = 3, name: str = "default", seed: int = 1, depth: int = 2) -> nn.Module:
    model = tiny(classes, depth=depth)
    inject(model, config, name)
    train(model, name, seed)
    return model


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    result: Tensor = model(IMAGES)
    return result


def facts(model: nn.Module) -> dict[str, Any]:
    """A full description of a model; `same` compares two of them."""
    return {
        "tensors": {key: value.clone() for key, value in model.state_dict().items()},
        "classes": {path: type(module) for path, module in model.named_modules()},
        "attributes": {path: sorted(vars(module)) for path, module in model.named_modules()},
        "trainable": {key: parameter.requires_grad for key, parameter in model.named_parameters()},
        "objects": {key: id(parameter) for key, parameter in model.named_parameters()},
        "active": active_adapters(model),
        "output": output(model),
    }


def assert_same(model: nn.Module, before: dict[str, Any]) -> None:
    after = facts(model)
    for fact in ("classes", "attributes", "trainable", "objects", "active"):
        assert after[fact] == before[fact], fact
    assert list(after["tensors"]) == list(before["tensors"])
    assert all(torch.equal(after["tensors"][key], value) for key, value in before["tensors"].items())
    assert torch.equal(after["output"], before["output"])


Breaker = Callable[[bytes], bytes]


def split(raw: bytes) -> tuple[bytes, bytes]:
    """The header and the data section of a file."""
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def text(change: Callable[[str], str]) -> Breaker:
    """Edit the header as text."""

    def broken(raw: bytes) -> bytes:
        header, data = split(raw)
        changed = change(header.decode())
        assert changed != header.decode(), "this case breaks nothing"
        return join(changed.encode(), data)

    return broken


def header(change: Callable[[dict[str, Any]], object]) -> Breaker:
    """Edit the header as a parsed object."""

    def broken(raw: str) -> str:
        fields = json.loads(raw)
        change(fields)
        return json.dumps(fields)

    return text(broken)


def about(change: Callable[[dict[str, Any]], object]) -> Breaker:
    """Edit the metadata as a parsed object."""

    def broken(fields: dict[str, Any]) -> None:
        metadata = json.loads(fields["__metadata__"][METADATA_KEY])
        change(metadata)
        fields["__metadata__"][METADATA_KEY] = json.dumps(metadata)

    return header(broken)


def field(name: str, value: Any) -> Breaker:
    return about(lambda metadata: metadata.update({name: value}))


def config(name: str, value: Any) -> Breaker:
    return about(lambda metadata: metadata["config"].update({name: value}))


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Breaker:
    """Edit the tensors and write a header that matches them."""

    def broken(raw: bytes) -> bytes:
        values = safetensors.torch.load(raw)
        change(values)
        metadata = json.loads(split(raw)[0])["__metadata__"]
        return safetensors.torch.save({key: value.contiguous() for key, value in values.items()}, metadata)

    return broken


def tensor(key: str, change: Callable[[Tensor], Tensor]) -> Breaker:
    return tensors(lambda values: values.update({key: change(values[key])}))


def item(key: str, value: float) -> Breaker:
    return tensor(key, lambda old: torch.cat([old.flatten()[:-1], old.new_tensor([value])]).reshape(old.shape))


def both(*breakers: Breaker) -> Breaker:
    def broken(raw: bytes) -> bytes:
        for breaker in breakers:
            raw = breaker(raw)
        return raw

    return broken


def whole(name: str, value: Tensor) -> Breaker:
    """Add a tensor that was trained whole, declared as the format requires."""
    return both(tensors(lambda t: t.update({f"full.{name}": value})), about(lambda m: m["whole"].append(name)))


C, L = f"{Q}.coefficients", f"{Q}.locations"
