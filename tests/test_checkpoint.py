"""Adapter files: what is refused and that nothing is touched then, and that what is saved comes back."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import timm
import torch
from conftest import within
from torch import Tensor, nn

from loca_vision import LoCAConfig, active_adapters, adapters, inject, load_adapter, remove, save_adapter, set_adapters
from loca_vision.formats import save_load as checkpoint
from loca_vision.formats.adapter_file import FILE_NAME, METADATA_KEY, nearest
from loca_vision.formats.save_load import base_model_name
from loca_vision.model.target_checks import classifier
from loca_vision.model.traversal import own_parameters

CONFIG = LoCAConfig(n_components=20, scale=2.0)
PROJECTIONS = ("blocks.0.attn.q", "blocks.0.attn.v", "blocks.1.attn.q", "blocks.1.attn.v")
Q = PROJECTIONS[0]
IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
NAME = "adapter.safetensors"


def tiny(classes: int = 3, seed: int = 0) -> nn.Module:
    """The same weights for the same arguments, as a pretrained model has; the head apart."""
    torch.manual_seed(seed)
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "img_size": 32}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **sizes).eval()
    return model


@torch.no_grad()
def train(model: nn.Module, name: str = "default", seed: int = 1) -> None:
    """Move everything that training could: coefficients, locations and what else is trainable."""
    torch.manual_seed(seed)
    for spectrum in adapters(model, name).values():
        spectrum.coefficients.normal_()
        spectrum.locations.copy_(torch.rand_like(spectrum.locations))
    for parameter in own_parameters(model).values():
        if parameter.requires_grad:
            parameter.normal_()


def trained(config: LoCAConfig = CONFIG, classes: int = 3, name: str = "default", seed: int = 1) -> nn.Module:
    model = tiny(classes)
    inject(model, config, name)
    train(model, name, seed)
    return model


@torch.no_grad()
def output(model: nn.Module) -> Tensor:
    result: Tensor = model(IMAGES)
    return result


def facts(model: nn.Module) -> dict[str, Any]:
    """All there is to tell about a model; `same` compares two."""
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


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model that no test here may change, since all loads into it are refused."""
    return tiny()


@pytest.fixture(scope="module")
def untouched(model: nn.Module) -> dict[str, Any]:
    return facts(model)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return save_adapter(trained(), tmp_path_factory.mktemp("good") / NAME).read_bytes()


# Broken files, made from a good one

Breaker = Callable[[bytes], bytes]


def split(raw: bytes) -> tuple[bytes, bytes]:
    """The header and the data of a file."""
    length = int.from_bytes(raw[:8], "little")
    return raw[8 : 8 + length], raw[8 + length :]


def join(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def text(change: Callable[[str], str]) -> Breaker:
    """Change the text of the header."""

    def broken(raw: bytes) -> bytes:
        header, data = split(raw)
        changed = change(header.decode())
        assert changed != header.decode(), "this case breaks nothing"
        return join(changed.encode(), data)

    return broken


def replaced(old: str, new: str) -> Breaker:
    return text(lambda header: header.replace(old, new, 1))


def header(change: Callable[[dict[str, Any]], object]) -> Breaker:
    """Change the header as an object."""

    def broken(raw: str) -> str:
        fields = json.loads(raw)
        change(fields)
        return json.dumps(fields)

    return text(broken)


def about(change: Callable[[dict[str, Any]], object]) -> Breaker:
    """Change the metadata as an object."""

    def broken(fields: dict[str, Any]) -> None:
        metadata = json.loads(fields["__metadata__"][METADATA_KEY])
        change(metadata)
        fields["__metadata__"][METADATA_KEY] = json.dumps(metadata)

    return header(broken)


def about_text(change: Callable[[str], str]) -> Breaker:
    """Change the text of the metadata."""

    def broken(fields: dict[str, Any]) -> None:
        fields["__metadata__"][METADATA_KEY] = change(fields["__metadata__"][METADATA_KEY])

    return header(broken)


def field(name: str, value: Any) -> Breaker:
    return about(lambda metadata: metadata.update({name: value}))


def config(name: str, value: Any) -> Breaker:
    return about(lambda metadata: metadata["config"].update({name: value}))


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Breaker:
    """Change the tensors, under a header that fits them."""

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


def cut(where: Callable[[int, int], int]) -> Breaker:
    """Cut to `where(length of the header, length of the file)`."""
    return lambda raw: raw[: where(len(split(raw)[0]), len(raw))]


def shifted(raw: bytes, *, by: int) -> bytes:
    """Move the data of the last tensor: a hole before it, or an overlap."""

    def move(fields: dict[str, Any]) -> None:
        last = max((f for name, f in fields.items() if name != "__metadata__"), key=lambda f: f["data_offsets"][1])
        last["data_offsets"] = [offset + by for offset in last["data_offsets"]]

    moved = header(move)(raw)
    return moved + bytes(by) if by > 0 else moved[:by]


def repeated_key(raw: bytes) -> bytes:
    key = f'"{Q}.coefficients":'
    fields = json.loads(split(raw)[0])[f"{Q}.coefficients"]
    return text(lambda header: header.replace(key, f"{key}{json.dumps(fields)},{key}", 1))(raw)


def entry(key: str, name: str, value: Any) -> Breaker:
    return header(lambda fields: fields[key].update({name: value}))


def extra_projection(raw: bytes) -> bytes:
    where = "blocks.2.attn.q"
    values = {f"{where}.coefficients": torch.ones(20), f"{where}.locations": torch.zeros(20, dtype=torch.int32)}
    return both(tensors(lambda t: t.update(values)), about(lambda m: m["shapes"].update({where: [48, 48]})))(raw)


def without(projection: str) -> Breaker:
    def drop(values: dict[str, Tensor]) -> None:
        del values[f"{projection}.coefficients"], values[f"{projection}.locations"]

    return both(tensors(drop), about(lambda metadata: metadata["shapes"].pop(projection)))


def whole(name: str, value: Tensor) -> Breaker:
    """Add a whole tensor in due form."""
    return both(tensors(lambda t: t.update({f"full.{name}": value})), about(lambda m: m["whole"].append(name)))


C, L = f"{Q}.coefficients", f"{Q}.locations"

BROKEN: dict[str, tuple[Breaker, str]] = {
    # The container
    "empty": (lambda raw: b"", "cut short"),
    "length of the header cut": (lambda raw: raw[:7], "cut short"),
    "nothing but a length": (lambda raw: raw[:8], "cut short"),
    "cut in the header": (cut(lambda header, file: 8 + header // 2), "cut short"),
    "cut before the end of the header": (cut(lambda header, file: 7 + header), "cut short"),
    "cut after the header": (cut(lambda header, file: 8 + header), "the tensors fill"),
    "cut in the data": (cut(lambda header, file: (8 + header + file) // 2), "the tensors fill"),
    "cut before the last byte": (cut(lambda header, file: file - 1), "the tensors fill"),
    "trailing byte": (lambda raw: raw + b"\0", "the tensors fill"),
    "the file twice": (lambda raw: raw + raw, "the tensors fill"),
    "header of 2**60 bytes": (lambda raw: (2**60).to_bytes(8, "little") + raw[8:], "does not fit"),
    "header of 2**64 - 1 bytes": (lambda raw: b"\xff" * 8 + raw[8:], "does not fit"),
    "header of 9 MiB": (text(lambda header: header.ljust(9 * 2**20)), "of at most 8388608"),
    "header of 8 MiB and a byte": (text(lambda header: header.ljust(8 * 2**20 + 1)), "of at most 8388608"),
    "header of no bytes": (lambda raw: bytes(8) + raw[8:], "does not begin with '{'"),
    "hole": (lambda raw: shifted(raw, by=8), "was due"),
    "overlap": (lambda raw: shifted(raw, by=-8), "was due"),
    "data before the first tensor": (header(lambda h: h[C].update(data_offsets=[8, 88])), "was due"),
    "two tensors of one place": (header(lambda h: h.update(twin=h[C])), "twin"),
    "repeated key of equal offsets": (repeated_key, f"'{C}' comes twice"),
    "space before the header": (text(lambda header: " " + header), "does not begin with '{'"),
    "byte order mark": (text(lambda header: "\ufeff" + header), "does not begin with '{'"),
    "header is a list": (text(lambda header: f"[{header}]"), "does not begin with '{'"),
    "text after the header": (text(lambda header: header + "{}"), "Extra data"),
    "NUL after the header": (text(lambda header: header + "\0"), "Extra data"),
    "header is no JSON": (text(lambda header: header[:-9]), "line 1"),
    "header is not UTF-8": (lambda raw: join(split(raw)[0].replace(b"blocks", b"bl\xffcks", 1), split(raw)[1]), "utf-8"),
    "deep header": (text(lambda header: '{"a":' + "[" * 100_000 + "]" * 100_000 + "," + header[1:]), "nested too deeply"),
    "header with NaN": (replaced('"data_offsets":[0,80]', '"data_offsets":[NaN,80]'), "NaN"),
    "unknown dtype": (entry(C, "dtype", "F8_E4M3"), "F8_E4M3"),
    "dtype is a list": (entry(C, "dtype", ["F32"]), f"{C}': dtype"),
    "tensor with one more field": (entry(C, "strides", [1]), f"{C}': a tensor has dtype"),
    "tensor without a shape": (header(lambda h: h[C].pop("shape")), f"{C}': a tensor has dtype"),
    "tensor is a number": (header(lambda h: h.update({C: 3})), f"{C}': a tensor has dtype"),
    "shape of 10**9": (entry(C, "shape", [10**9]), "80 bytes for [1000000000]"),
    "shape that overflows 64 bits": (entry(C, "shape", [2**32, 2**32]), "80 bytes for"),
    "negative shape": (entry(C, "shape", [-20]), "whole numbers from 0 up"),
    "shape of fractions": (entry(C, "shape", [20.0]), "whole numbers from 0 up"),
    "shape of truth values": (entry(C, "shape", [True]), "whole numbers from 0 up"),
    "shape of 9 axes": (entry(C, "shape", [20] + [1] * 8), "9 axes"),
    "offsets the wrong way round": (entry(C, "data_offsets", [80, 0]), "-80 bytes"),
    "offsets of 10**400": (entry(C, "data_offsets", [0, 10**400]), "too long or too large"),
    "three offsets": (entry(C, "data_offsets", [0, 40, 80]), "data_offsets"),
    "no metadata": (header(lambda h: h.pop("__metadata__")), f"no {METADATA_KEY}"),
    "metadata of another method's file": (header(lambda h: h.update(__metadata__={"format": "pt"})), f"no {METADATA_KEY}"),
    "metadata is null": (header(lambda h: h.update(__metadata__=None)), "not a table of texts"),
    "metadata is an object": (header(lambda h: h["__metadata__"].update({METADATA_KEY: {}})), "not a table of texts"),
    # Metadata
    "metadata is no JSON": (about_text(lambda t: t[1:]), "line 1"),
    "metadata is a list": (about_text(lambda t: f"[{t}]"), "not an object with a format_version"),
    "deep metadata": (about_text(lambda t: '{"a":' + "[" * 100_000 + "]" * 100_000 + "," + t[1:]), "nested too deeply"),
    "deep shapes": (field("shapes", {Q: [[[[[[[[48]]]]]]]]}), "nested too deeply"),
    "repeated key in the metadata": (about_text(lambda t: '{"format_version": 1, ' + t[1:]), "'format_version' comes twice"),
    "repeated projection": (about_text(lambda t: t.replace(f'"{Q}"', f'"{Q}": [48, 48], "{Q}"', 1)), f"'{Q}' comes twice"),
    "version 2": (field("format_version", 2), "format_version=2"),
    "version 0": (field("format_version", 0), "format_version=0"),
    "version as a text": (field("format_version", "1"), "format_version"),
    "version true": (field("format_version", True), "format_version"),
    "version 1.0": (field("format_version", 1.0), "format_version"),
    "no version": (about(lambda m: m.pop("format_version")), "format_version"),
    "another method": (field("method", "lokr"), "method='lokr'"),
    "unknown field": (field("auto_map", "evil.Model"), "['auto_map']"),
    "missing field": (about(lambda m: m.pop("base_model")), "['base_model']"),
    "base model differs": (field("base_model", "vit_small_patch16_224.augreg_in21k"), "trained on vit_small_patch16_224"),
    "base model is null": (field("base_model", None), "base_model=None"),
    "name that leaves the folder": (field("name", "../../etc/passwd"), "name='../../etc/passwd'"),
    "name with an escape sequence": (field("name", "\x1b[31m"), "name="),
    "empty name": (field("name", ""), "name=''"),
    "name of a method": (field("name", "a.forward"), "name='a.forward'"),
    "name is a number": (field("name", 7), "name=7"),
    "unknown setting": (config("rank", 8), "config: its fields are"),
    "missing setting": (about(lambda m: m["config"].pop("seed")), "config: its fields are"),
    "config is null": (field("config", None), "config: its fields are"),
    "scale NaN": (about_text(lambda t: t.replace('"scale": 2.0', '"scale": NaN')), "NaN"),
    "scale 1e999": (about_text(lambda t: t.replace('"scale": 2.0', '"scale": 1e999')), "1e999"),
    "scale -Infinity": (about_text(lambda t: t.replace('"scale": 2.0', '"scale": -Infinity')), "-Infinity"),
    "scale 10**400": (config("scale", 10**400), "too long or too large"),
    "scale 0": (config("scale", 0), "scale=0"),
    "scale is a text": (config("scale", "2"), "scale='2'"),
    "scale that overflows": (config("scale", 1e300), f"{Q}.coefficients times the scale 1e+300"),
    "10**9 components": (config("n_components", 10**9), "1000000000 components, of 48 x 48"),
    "no components": (config("n_components", 0), "n_components=0"),
    "true components": (config("n_components", True), "n_components=True"),
    "another count": (config("n_components", 19), f"{Q}.coefficients has shape (20,): by the settings it is (19,)"),
    "counts by pattern": (config("n_components", {"*": 20}), "n_components does not name the projections"),
    "counts of half the projections": (config("n_components", {Q: 20}), "n_components does not name the projections"),
    "another count of one projection": (
        config("n_components", dict.fromkeys(PROJECTIONS, 20) | {Q: 21}),
        f"{Q}.coefficients has shape (20,): by the settings it is (21,)",
    ),
    "targets is a text": (config("targets", "qv"), "targets='qv'"),
    "unknown target": (config("targets", ["q", "w"]), "'w' is not one of"),
    "targets are lists": (config("targets", [["q"], ["v"]]), "targets="),
    "fewer targets": (config("targets", ["q"]), "no projection blocks.0.attn.v"),
    "more targets": (config("targets", ["q", "v", "out"]), "projection blocks.0.attn.out has no update"),
    "unknown gradient": (config("location_gradient", "sideways"), "location_gradient='sideways'"),
    "location_init is a list": (config("location_init", ["uniform"]), "location_init="),
    "negative seed": (config("seed", -1), "seed=-1"),
    "no shapes": (field("shapes", {}), "shapes: it names no projection"),
    "shapes are a list": (field("shapes", [[48, 48]]), "shapes: it names no projection"),
    "shapes of 10**9": (about(lambda m: m["shapes"].update({Q: [10**9, 10**9]})), f"shapes['{Q}']=[1000000000, 1000000000]"),
    "one size": (about(lambda m: m["shapes"].update({Q: [2304]})), f"shapes['{Q}']"),
    "size of no rows": (about(lambda m: m["shapes"].update({Q: [0, 48]})), f"shapes['{Q}']"),
    "size as a fraction": (about(lambda m: m["shapes"].update({Q: [48.0, 48]})), f"shapes['{Q}']"),
    "shape that is not the model's": (about(lambda m: m["shapes"].update({Q: [48, 96]})), f"{Q} is (48, 96) in the file"),
    "shape the other way round": (about(lambda m: m["shapes"].update({Q: [24, 96]})), f"{Q} is (24, 96) in the file"),
    "projection without a shape": (about(lambda m: m["shapes"].pop(Q)), f"{Q}.coefficients is unknown"),
    "shape without a projection": (
        about(lambda m: m["shapes"].update({"blocks.2.attn.q": [48, 48]})),
        "blocks.2.attn.q.coefficients is missing",
    ),
    "projection that the model has not": (extra_projection, "the model has no projection blocks.2.attn.q; near it are blocks."),
    "projection that the file has not": (without(Q), f"the model's projection {Q} has no update"),
    # Tensors
    "NaN": (item(C, math.nan), f"{C} holds NaN or infinity"),
    "infinity": (item(C, math.inf), f"{C} holds NaN or infinity"),
    "minus infinity in the head": (item("full.head.weight", -math.inf), "full.head.weight holds NaN or infinity"),
    "NaN in float16": (tensor(C, lambda t: t.half().fill_(math.nan)), f"{C} holds NaN or infinity"),
    "coefficients that add up to infinity": (tensor(C, lambda t: torch.full_like(t, 1e38)), f"{C} times the scale"),
    "head too large for the model": (
        tensor("full.head.bias", lambda t: torch.full_like(t, 1e300, dtype=torch.float64)),
        "full.head.bias overflows torch.float32",
    ),
    "missing coefficients": (tensors(lambda t: t.pop(C)), f"{C} is missing"),
    "missing locations": (tensors(lambda t: t.pop(L)), f"{L} is missing"),
    "missing half of the head": (tensors(lambda t: t.pop("full.head.bias")), "full.head.bias is missing"),
    "no tensors": (tensors(lambda t: t.clear()), "is missing"),
    "misspelt tensor": (
        tensors(lambda t: t.update({"blocks.0.attn.q.coefficient": torch.ones(20)})),
        f"blocks.0.attn.q.coefficient is unknown; near it are {C}",
    ),
    "unexpected tensor": (tensors(lambda t: t.update(surprise=torch.ones(20))), "surprise is unknown"),
    "unexpected tensor of nothing": (tensors(lambda t: t.update(surprise=torch.ones(0))), "surprise is unknown"),
    "whole tensor not listed": (
        tensors(lambda t: t.update({"full.norm.bias": torch.ones(48)})),
        "full.norm.bias is unknown",
    ),
    "component's prefix": (tensors(lambda t: t.update({f"unet.{C}": t.pop(C)})), f"{C} is missing"),
    "int8 coefficients": (tensor(C, lambda t: t.to(torch.int8)), f"{C} has dtype I8"),
    "int32 coefficients": (tensor(C, lambda t: t.to(torch.int32)), f"{C} has dtype I32"),
    "boolean coefficients": (tensor(C, lambda t: t > 0), f"{C} has dtype BOOL"),
    "complex coefficients": (tensor(C, lambda t: t.to(torch.complex64)), f"'{C}': dtype 'C64'"),
    "bfloat16 coefficients": (tensor(C, lambda t: t.bfloat16()), f"{C} has dtype BF16"),
    "float64 coefficients": (tensor(C, lambda t: t.double()), f"{C} has dtype F64"),
    "int64 locations": (tensor(L, lambda t: t.long()), f"{L} has dtype I64"),
    "int16 locations": (tensor(L, lambda t: t.short()), f"{L} has dtype I16"),
    "float locations": (tensor(L, lambda t: t.float()), f"{L} has dtype F32"),
    "coefficients of two axes": (tensor(C, lambda t: t.reshape(20, 1)), f"{C} has shape (20, 1)"),
    "locations as pairs": (tensor(L, lambda t: torch.stack([t, t], 1)), f"{L} has shape (20, 2)"),
    "one coefficient more": (tensor(C, lambda t: torch.ones(21)), f"{C} has shape (21,): by the settings it is (20,)"),
    "one location less": (tensor(L, lambda t: t[1:]), f"{L} has shape (19,): by the settings it is (20,)"),
    "empty coefficients": (tensor(C, lambda t: t[:0]), f"{C} has shape (0,)"),
    "coefficient as a scalar": (tensor(C, lambda t: t[0]), f"{C} has shape ()"),
    "location -1": (item(L, -1), f"{L} holds -1: a 48 x 48 matrix has cells 0 to 2303"),
    "location p * q": (item(L, 48 * 48), f"{L} holds 2304"),
    "location 2**31 - 1": (item(L, 2**31 - 1), f"{L} holds 2147483647"),
    "head of integers": (tensor("full.head.bias", lambda t: t.int()), "full.head.bias has dtype I32"),
    "head of two classes": (
        tensor("full.head.weight", lambda t: t[:2]),
        "full.head.weight is (2, 48) in the file and (3, 48) in the model: build it with as many classes",
    ),
    "head the other way round": (tensor("full.head.weight", lambda t: t.T), "full.head.weight is (48, 3) in the file"),
    "whole tensor of no parameter": (whole("norm.wieght", torch.ones(48)), "no parameter norm.wieght; near it are norm.weight"),
    "whole tensor of an adapter's": (
        whole("blocks.0.attn.qkv.loca.updates.0.coefficients", torch.ones(20)),
        "the model has no parameter blocks.0.attn.qkv.loca",
    ),
    "whole tensor of another shape": (whole("norm.bias", torch.ones(47)), "full.norm.bias is (47,) in the file"),
    "whole names are no list": (field("whole", "head"), "whole='head'"),
    "whole names repeat": (field("whole", ["head.bias", "head.bias", "head.weight"]), "whole="),
    "whole name is a number": (field("whole", [1]), "whole=[1]"),
    # Long and unprintable names
    "name of a MiB": (tensors(lambda t: t.update({"x" * 2**20: torch.ones(1)})), "is unknown"),
    "projection of a MiB": (
        about(lambda m: m["shapes"].update({"x" * 2**20: [1, 1]})),
        "has 20 components, of 1 x 1 = 1 cells",
    ),
    "method of a MiB": (field("method", "x" * 2**20), "method='xxx"),
    "name with a line break": (tensors(lambda t: t.update({"x\n\x1b[2Jy": torch.ones(1)})), r"x\n\x1b[2Jy is unknown"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_and_nothing_is_touched(
    case: str, good: bytes, model: nn.Module, untouched: dict[str, Any], tmp_path: Path
) -> None:
    breaker, words = BROKEN[case]
    file = tmp_path / NAME
    file.write_bytes(breaker(good))
    with within(20), pytest.raises(ValueError) as caught:
        load_adapter(model, file)
    sentence = str(caught.value)
    assert sentence.startswith(f"{file}: ") and words in sentence
    assert sentence.isprintable() and len(sentence) < len(str(file)) + 700
    assert_same(model, untouched)


def test_the_good_file_is_not_broken(good: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(good)
    assert load_adapter(tiny(), tmp_path / NAME) == PROJECTIONS


# What is no file


def pickled(file: Path) -> str:
    file.write_bytes(pickle.dumps({"state": [1.0] * 100}))
    return "it is a pickle"


def saved_by_torch(file: Path) -> str:
    torch.save({"weight": torch.ones(3)}, file)
    return "it is a PyTorch archive"


def saved_by_old_torch(file: Path) -> str:
    torch.save({"weight": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    return "it is a pickle"


def fifo(file: Path) -> str:
    os.mkfifo(file)
    return "it is not a regular file"


def fifo_in_a_folder(file: Path) -> str:
    file.mkdir()
    os.mkfifo(file / FILE_NAME)
    return f"{FILE_NAME}: it is not a regular file"


def folder_as_file_in_a_folder(file: Path) -> str:
    (file / FILE_NAME).mkdir(parents=True)
    return f"{FILE_NAME}: it is not a regular file"


def device(file: Path) -> str:
    file.symlink_to("/dev/zero")
    return "it is not a regular file"


@pytest.mark.parametrize(
    "make", [pickled, saved_by_torch, saved_by_old_torch, fifo, fifo_in_a_folder, folder_as_file_in_a_folder, device]
)
def test_what_is_no_safetensors_file(
    make: Callable[[Path], str], model: nn.Module, untouched: dict[str, Any], tmp_path: Path
) -> None:
    words = make(tmp_path / NAME)
    with within(5), pytest.raises(ValueError) as caught:
        load_adapter(model, tmp_path / NAME)
    assert NAME in str(caught.value) and words in str(caught.value)
    assert_same(model, untouched)


def nothing(folder: Path) -> tuple[Path, str]:
    return folder / NAME, "there is no such file"


def link_to_itself(folder: Path) -> tuple[Path, str]:
    (folder / NAME).symlink_to(NAME)
    return folder / NAME, "there is no such file"


def link_to_nothing(folder: Path) -> tuple[Path, str]:
    (folder / NAME).symlink_to("nothing")
    return folder / NAME, "there is no such file"


def below_a_file(folder: Path) -> tuple[Path, str]:
    (folder / "file").write_bytes(b"")
    return folder / "file" / NAME, "there is no such file"


def empty_folder(folder: Path) -> tuple[Path, str]:
    (folder / NAME).mkdir()
    return folder / NAME, f"there is no {FILE_NAME} in that folder"


def folder_of_a_pickle(folder: Path) -> tuple[Path, str]:
    (folder / NAME).mkdir()
    torch.save({}, folder / NAME / "pytorch_loca_weights.bin")
    return folder / NAME, "pytorch_loca_weights.bin is there, but a pickle could run code"


@pytest.mark.parametrize("make", [nothing, link_to_itself, link_to_nothing, below_a_file, empty_folder, folder_of_a_pickle])
def test_what_is_not_there(
    make: Callable[[Path], tuple[Path, str]], model: nn.Module, untouched: dict[str, Any], tmp_path: Path
) -> None:
    path, words = make(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load_adapter(model, path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
    assert_same(model, untouched)


def test_nul_in_a_path(model: nn.Module, untouched: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter\\x00\.safetensors': a path holds no NUL"):
        load_adapter(model, tmp_path / "adapter\0.safetensors")
    with pytest.raises(ValueError, match="a path holds no NUL"):
        save_adapter(trained(), tmp_path / "adapter\0.safetensors")
    assert_same(model, untouched)


# Files that do not fit the model


@pytest.mark.parametrize("name", [None, "default", "../up", "", "a b", "x" * 101])
def test_a_name_in_use_or_unfit(name: str | None, good: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(good)
    model = trained(seed=7)
    before = facts(model)
    with pytest.raises(ValueError, match=r"adapter\.safetensors: name="):
        load_adapter(model, tmp_path / NAME, name)
    assert_same(model, before)
    remove(model)
    assert not hasattr(model, "_loca_record")


def other_depth() -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=48, depth=1, num_heads=3, patch_size=8, img_size=32, num_classes=3
    )
    return model


def other_width() -> nn.Module:
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=96, depth=2, num_heads=3, patch_size=8, img_size=32, num_classes=3
    )
    return model


def other_kind() -> nn.Module:
    model: nn.Module = timm.create_model("resnet10t", num_classes=3)
    return model


def other_layer() -> nn.Module:
    model = tiny()
    model.blocks[0].attn.qkv = nn.Conv1d(48, 144, 1)
    model.blocks[0].attn.forward = lambda x, **_: x
    return model


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: tiny(classes=5), "full.head.bias is (3,) in the file and (5,) in the model: build it with as many classes"),
        (lambda: tiny(classes=0), "full.head.bias: the model has no parameter head.bias"),
        (other_depth, "the model has no projection blocks.1.attn.q; near it are blocks.0.attn.q"),
        (other_width, "blocks.0.attn.q is (48, 48) in the file and (96, 96) in the model"),
        (other_kind, "it was trained on vit_tiny_patch16_224.augreg_in21k_ft_in1k; this model is resnet10t"),
        (other_layer, "blocks.0.attn.q is a Conv1d"),
    ],
    ids=["more classes", "no head", "fewer blocks", "other width", "other family", "other layer"],
)
def test_another_model(build: Callable[[], nn.Module], words: str, good: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(good)
    model = build().eval()
    before = facts(model)
    with pytest.raises(ValueError) as caught:
        load_adapter(model, tmp_path / NAME)
    assert str(caught.value).startswith(f"{tmp_path / NAME}: ") and words in str(caught.value)
    assert_same(model, before)


def test_a_head_that_overflows_the_models_own_dtype(good: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(item("full.head.bias", 1e5)(good))
    model = tiny().half()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"full\.head\.bias overflows torch\.float16"):
        load_adapter(model, tmp_path / NAME)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not hasattr(model, "_loca_record")


def test_hints_take_no_time() -> None:
    letters = random.Random(0)

    def word(length: int) -> str:
        return "".join(letters.choices([chr(0x4E00 + i) for i in range(120)], k=length))

    with within(20):
        assert nearest(word(100_000), [word(100_000)]) == ""
        nearest(word(200), [word(200) for _ in range(20_000)])


# Fuzzing


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


# Round trips

_ELSEWHERE = """
import sys
import timm, torch
import loca_vision
assert not any(name.split(".")[0] in ("diffusers", "transformers") for name in sys.modules)
before = torch.load(sys.argv[1], weights_only=True)
model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3, patch_size=8, img_size=32, num_classes=3)
model.eval().load_state_dict(before["base"])
loca_vision.load_adapter(model, sys.argv[2])
with torch.no_grad():
    after = model(before["images"])
assert torch.equal(after, before["output"]), (after - before["output"]).abs().max()
loca_vision.remove(model)
assert all(torch.equal(value, before["base"][key]) for key, value in model.state_dict().items())
"""


def test_another_process_gives_bit_identical_outputs(tmp_path: Path) -> None:
    base = {key: value.clone() for key, value in tiny().state_dict().items()}
    model = trained(LoCAConfig(n_components=300, targets=("q", "k", "v", "out", "fc1", "fc2"), scale=0.7))
    assert not torch.equal(output(model), output(tiny()))
    torch.save({"base": base, "images": IMAGES, "output": output(model)}, tmp_path / "before.pt")
    file = save_adapter(model, tmp_path / "runs" / "first")
    assert file == tmp_path / "runs" / "first" / FILE_NAME
    command = [sys.executable, "-c", _ELSEWHERE, str(tmp_path / "before.pt"), str(file.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        LoCAConfig(n_components=1, targets=("v",), location_gradient="forward", seed=2**63 - 1, scale=1),
        LoCAConfig(n_components=48 * 48, targets=("out", "q")),
        LoCAConfig(n_components={"blocks.0.*": 5, "*.v": 7, "*": 9}, targets=("q", "k", "v"), location_gradient="backward"),
    ],
    ids=["plain", "one component", "every cell", "counts by pattern"],
)
def test_what_is_saved_comes_back(config: LoCAConfig, tmp_path: Path) -> None:
    model, copy = trained(config), tiny()
    names = load_adapter(copy, save_adapter(model, tmp_path / NAME))
    assert names == tuple(adapters(model)) and active_adapters(copy) == {"default": 1.0}
    assert torch.equal(output(copy), output(model))
    for projection, spectrum in adapters(copy).items():
        mine = adapters(model)[projection]
        assert torch.equal(spectrum.cells, mine.cells) and torch.equal(spectrum.coefficients, mine.coefficients)
        assert (spectrum.shape, spectrum.scale, spectrum.difference) == (mine.shape, mine.scale, mine.difference)
        assert spectrum.coefficients.requires_grad and not spectrum.locations.requires_grad
        assert spectrum.locations.dtype == spectrum.coefficients.dtype == torch.float32
    again = save_adapter(copy, tmp_path / "again.safetensors")
    assert again.read_bytes() == (tmp_path / NAME).read_bytes()


def test_files_name_projections_never_patterns(tmp_path: Path) -> None:
    model = trained(LoCAConfig(n_components={"blocks.0.*": 5, "*": 9}))
    raw = save_adapter(model, tmp_path / NAME).read_bytes()
    metadata = json.loads(json.loads(split(raw)[0])["__metadata__"][METADATA_KEY])
    assert metadata["config"]["n_components"] == {name: 5 if "blocks.0" in name else 9 for name in PROJECTIONS}


def test_moves_within_a_cell_do_not_matter(tmp_path: Path) -> None:
    model = trained()
    first = save_adapter(model, tmp_path / "a.safetensors").read_bytes()
    for spectrum in adapters(model).values():
        cells = spectrum.cells
        with torch.no_grad():
            spectrum.locations.copy_(((cells + torch.rand_like(spectrum.locations) * 0.9 - 0.45) / 47).clamp(0, 1))
        assert torch.equal(spectrum.cells, cells)
    assert save_adapter(model, tmp_path / "b.safetensors").read_bytes() == first


def test_components_of_one_cell_come_back_as_two(tmp_path: Path) -> None:
    model, copy = trained(), tiny()
    with torch.no_grad():
        adapters(model)[Q].locations.fill_(0.5)
    load_adapter(copy, save_adapter(model, tmp_path / NAME))
    assert torch.equal(output(copy), output(model)) and len(adapters(copy)[Q].cells.unique(dim=0)) == 1


def test_float16_coefficients(tmp_path: Path) -> None:
    model, copy = trained(), tiny()
    file = save_adapter(model, tmp_path / NAME, dtype=torch.float16)
    whole = save_adapter(model, tmp_path / "float32.safetensors")
    assert whole.stat().st_size - file.stat().st_size in range(len(PROJECTIONS) * 20 * 2 - 8, len(PROJECTIONS) * 20 * 2 + 9)
    load_adapter(copy, file)
    for projection, spectrum in adapters(copy).items():
        assert spectrum.coefficients.dtype == torch.float32
        assert torch.equal(spectrum.coefficients, adapters(model)[projection].coefficients.half().float())
    with torch.no_grad():
        for spectrum in adapters(model).values():
            spectrum.coefficients.copy_(spectrum.coefficients.half())
    assert torch.equal(output(copy), output(model))


def test_a_half_precision_model_keeps_exact_spectra(tmp_path: Path) -> None:
    model = trained().bfloat16()
    copy = tiny().bfloat16()
    load_adapter(copy, save_adapter(model, tmp_path / NAME))
    with torch.no_grad():
        assert torch.equal(copy(IMAGES.bfloat16()), model(IMAGES.bfloat16()))
    assert all(torch.equal(s.cells, adapters(model)[p].cells) for p, s in adapters(copy).items())
    assert next(iter(classifier(copy))).dtype == torch.bfloat16
    assert save_adapter(copy, tmp_path / "again.safetensors").read_bytes() == (tmp_path / NAME).read_bytes()


def test_eight_bytes_a_component(tmp_path: Path) -> None:
    sizes = [
        save_adapter(trained(LoCAConfig(n_components=count)), tmp_path / f"{count}.safetensors").stat().st_size
        for count in (1000, 2000)
    ]
    header = 2048
    assert abs(sizes[1] - sizes[0] - 1000 * len(PROJECTIONS) * 8) < 64
    assert sizes[0] < 1000 * len(PROJECTIONS) * 8 + (3 * 48 + 3) * 4 + header


def test_the_name_is_the_saved_one_unless_another_is_given(tmp_path: Path) -> None:
    file = save_adapter(trained(name="cats-2"), tmp_path / NAME, "cats-2")
    model = tiny()
    load_adapter(model, file)
    load_adapter(model, file, "dogs")
    assert list(active_adapters(model)) == ["cats-2", "dogs"]


def test_a_hostile_name_in_the_file_does_not_matter_where_another_is_given(good: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(field("name", "../x")(good))
    model = tiny()
    load_adapter(model, tmp_path / NAME, "mine")
    assert list(active_adapters(model)) == ["mine"]


def test_a_file_cut_after_loading_does_not_matter(good: bytes, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(good)
    model = tiny()
    load_adapter(model, tmp_path / NAME)
    os.truncate(tmp_path / NAME, 0)
    assert torch.equal(output(model), output(trained()))


def test_a_loaded_adapter_goes_on_training(tmp_path: Path) -> None:
    model = tiny()
    load_adapter(model, save_adapter(trained(), tmp_path / NAME))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"head.weight", "head.bias"} < trainable and len(trainable) == 2 + len(PROJECTIONS)
    model(IMAGES).square().mean().backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == trainable


# Whole tensors


def test_the_head_travels_and_goes_back(tmp_path: Path) -> None:
    model, copy = trained(), tiny()
    with torch.no_grad():
        for parameter in classifier(copy):
            parameter.fill_(0.25)
    before = facts(copy)
    load_adapter(copy, save_adapter(model, tmp_path / NAME))
    assert torch.equal(copy.head.weight, model.head.weight)
    remove(copy)
    assert_same(copy, before)


@pytest.mark.parametrize("merge", [False, True])
def test_remove_takes_the_head_back_unless_merged(merge: bool, tmp_path: Path) -> None:
    for model in (trained(), tiny()):
        if not active_adapters(model):
            load_adapter(model, save_adapter(trained(), tmp_path / NAME))
        acting = output(model)
        remove(model, merge=merge)
        assert torch.equal(model.head.weight, (trained() if merge else tiny()).head.weight)
        torch.testing.assert_close(output(model), acting if merge else output(tiny()), rtol=0, atol=1e-4 if merge else 0)
        assert not hasattr(model, "_loca_record")
        assert {type(module) for module in model.modules()} == {type(module) for module in tiny().modules()}


def test_what_the_user_unfroze_travels_too(tmp_path: Path) -> None:
    model = tiny()
    inject(model, CONFIG)
    for parameter in model.norm.parameters():
        parameter.requires_grad_(True)
    train(model)
    file = save_adapter(model, tmp_path / NAME)
    assert {key for key in safetensors.torch.load_file(file) if key.startswith("full.")} == {
        "full.head.bias",
        "full.head.weight",
        "full.norm.bias",
        "full.norm.weight",
    }
    copy = tiny()
    before = facts(copy)
    load_adapter(copy, file)
    assert torch.equal(output(copy), output(model)) and copy.norm.weight.requires_grad
    assert save_adapter(copy, tmp_path / "again.safetensors").read_bytes() == file.read_bytes()
    remove(copy)
    assert_same(copy, before)


def test_several_adapters_each_with_its_head(tmp_path: Path) -> None:
    outputs, files = {}, {}
    for seed, name in enumerate(("first", "second", "third"), 11):
        model = trained(LoCAConfig(n_components=10 + seed, seed=seed), name=name, seed=seed)
        outputs[name], files[name] = output(model), save_adapter(model, tmp_path / f"{name}.safetensors", name)
    copy = tiny()
    before = facts(copy)
    for file in files.values():
        load_adapter(copy, file)
    for name in ("first", "third", "first", "second"):
        set_adapters(copy, name)
        assert torch.equal(output(copy), outputs[name])
    for name, file in files.items():  # whether it acts or not
        assert save_adapter(copy, tmp_path / "again.safetensors", name).read_bytes() == file.read_bytes()
    set_adapters(copy, [])
    assert torch.equal(output(copy), before["output"])
    set_adapters(copy, ["second", "first"])
    remove(copy, "first")
    assert torch.equal(output(copy), outputs["second"])
    remove(copy)
    assert_same(copy, before)


def test_a_model_inside_a_module_called_full(tmp_path: Path) -> None:
    """Its projections begin with `full.` as whole tensors do."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full = tiny()

        def forward(self, images: Tensor) -> Tensor:
            result: Tensor = self.full(images)
            return result

    model, copy = Outer(), Outer()
    inject(model, CONFIG)
    train(model)
    load_adapter(copy, save_adapter(model, tmp_path / NAME))
    assert torch.equal(output(copy), output(model))


# Saving


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda m: adapters(m)[Q].coefficients.fill_(math.nan), f"{C} holds NaN or infinity as torch.float32"),
        (lambda m: adapters(m)[Q].coefficients.fill_(1e38), f"{C} times the scale 2.0 overflows float32"),
        (lambda m: adapters(m)[Q].locations[3].fill_(math.nan), f"{L} holds NaN or infinity"),
        (lambda m: m.head.bias.fill_(math.inf), "full.head.bias holds NaN or infinity"),
    ],
    ids=["coefficients", "coefficients that add up to infinity", "locations", "head"],
)
def test_what_could_not_be_loaded_is_not_saved(spoil: Callable[[nn.Module], object], words: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"old")
    model = trained()
    with torch.no_grad():
        spoil(model)
    with pytest.raises(ValueError) as caught:
        save_adapter(model, tmp_path / NAME)
    assert words in str(caught.value)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(NAME, b"old")]


def test_float16_overflow_is_refused(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        adapters(model)[Q].coefficients[0] = 65520.0
    with pytest.raises(ValueError, match=r"coefficients holds NaN or infinity as torch\.float16"):
        save_adapter(model, tmp_path / NAME, dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    load_adapter(tiny(), save_adapter(model, tmp_path / NAME))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int32])
def test_other_dtypes_are_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"dtype={dtype}: coefficients are stored as"):
        save_adapter(trained(), tmp_path / NAME, dtype=dtype)


def test_where_a_file_may_go(tmp_path: Path) -> None:
    model = trained()
    with pytest.raises(ValueError, match=r"adapter\.bin': an adapter is a file that ends in \.safetensors"):
        save_adapter(model, tmp_path / "adapter.bin")
    with pytest.raises(ValueError, match="no adapter 'other'"):
        save_adapter(model, tmp_path, "other")
    with pytest.raises(ValueError, match="has no adapter"):
        save_adapter(tiny(), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert save_adapter(model, tmp_path) == tmp_path / FILE_NAME
    assert save_adapter(model, str(tmp_path / "new" / "folder")) == tmp_path / "new" / "folder" / FILE_NAME
    (tmp_path / "v1.0").mkdir()
    assert save_adapter(model, tmp_path / "v1.0") == tmp_path / "v1.0" / FILE_NAME


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = trained()
    before = facts(model)
    save_adapter(model, tmp_path / NAME)
    assert_same(model, before)


@pytest.mark.parametrize(
    ("about_it", "name"),
    [
        ({"architecture": "vit_tiny", "tag": "augreg"}, "vit_tiny.augreg"),
        ({"architecture": "vit_tiny", "tag": ""}, "vit_tiny"),
        ({}, "Linear"),
        (None, "Linear"),
    ],
)
def test_the_name_of_the_base_model(about_it: dict[str, str] | None, name: str) -> None:
    model = nn.Linear(1, 1)
    model.pretrained_cfg = about_it
    assert base_model_name(model) == name


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ("vit.a", "vit.a", True),
        ("vit.a", "vit.b", False),
        ("vit", "vit.b", True),  # random weights, or from a file: the tag is not known
        ("vit.a", "vit", True),
        ("vit.a", "deit.a", False),
        ("VisionTransformer", "Eva", False),
    ],
)
def test_which_bases_are_told_apart(mine: str, theirs: str, same: bool) -> None:
    assert checkpoint._may_be_the_same(mine, theirs) is same


# The hub


def test_a_repository_is_loaded_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake hub: what `hf_hub_download` is asked for, from a folder."""
    source = trained()
    save_adapter(source, tmp_path / "repository")
    asked = []

    def fetched(repository: str, name: str, **named: Any) -> str:
        asked.append((repository, name))
        return str(tmp_path / "repository" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    model = tiny()
    assert load_adapter(model, "user/pets") == PROJECTIONS
    assert asked == [("user/pets", FILE_NAME)]
    assert torch.equal(output(model), output(source))


@pytest.mark.parametrize("path", ["nowhere/pets.safetensors", "./user/pets", "a/b/c", Path("user/pets")], ids=str)
def test_what_can_be_no_repository_is_looked_for_here_only(
    path: str | Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    with pytest.raises(FileNotFoundError):
        load_adapter(tiny(), path)


def test_a_folder_goes_before_a_repository_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    save_adapter(trained(), "user/pets")
    assert load_adapter(tiny(), "user/pets") == PROJECTIONS
