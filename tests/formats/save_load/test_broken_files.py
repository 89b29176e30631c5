"""save_adapter and load_adapter: broken files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loca_vision import load_adapter
from loca_vision.formats.adapter_file import METADATA_KEY
from support.adapter_files import (
    NAME,
    PROJECTIONS,
    Breaker,
    C,
    L,
    Q,
    about,
    assert_same,
    both,
    config,
    field,
    header,
    item,
    join,
    split,
    tensor,
    tensors,
    text,
    tiny,
    whole,
)
from support.time_limit import within


def replaced(old: str, new: str) -> Breaker:
    return text(lambda header: header.replace(old, new, 1))


def about_text(change: Callable[[str], str]) -> Breaker:
    """Change the text of the metadata."""

    def broken(fields: dict[str, Any]) -> None:
        fields["__metadata__"][METADATA_KEY] = change(fields["__metadata__"][METADATA_KEY])

    return header(broken)


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
    "header is not JSON": (text(lambda header: header[:-9]), "line 1"),
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
    "metadata is not JSON": (about_text(lambda t: t[1:]), "line 1"),
    "metadata is a list": (about_text(lambda t: f"[{t}]"), "not an object with a format_version"),
    "deep metadata": (about_text(lambda t: '{"a":' + "[" * 100_000 + "]" * 100_000 + "," + t[1:]), "nested too deeply"),
    "deep shapes": (field("shapes", {Q: [[[[[[[[48]]]]]]]]}), "nested too deeply"),
    "repeated key in the metadata": (about_text(lambda t: '{"format_version": 1, ' + t[1:]), "'format_version' comes twice"),
    "repeated projection": (about_text(lambda t: t.replace(f'"{Q}"', f'"{Q}": [48, 48], "{Q}"', 1)), f"'{Q}' comes twice"),
    "version 3": (field("format_version", 3), "format_version=3: this library reads versions 1 and 2"),
    "version 2 with the fields of version 1": (field("format_version", 2), "['coefficients', 'shapes'] are missing or unknown"),
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
    "fewer targets": (config("targets", ["q"]), "blocks.0.attn.v is not one of the file's targets=('q',)"),
    "layers is a number": (config("layers", 3), "layers=3"),
    "layers is an empty list": (config("layers", []), "layers=[]"),
    "layers are lists": (config("layers", [["q"]]), "layers: expected a name pattern"),
    "layers without an end": (config("layers", ["a" * 501]), "layers: expected a name pattern"),
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
    "projection that the model has not": (extra_projection, "the model has no projection blocks.2.attn.q; perhaps blocks."),
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
        f"blocks.0.attn.q.coefficient is unknown; perhaps {C}",
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
        "full.head.weight is (2, 48) in the file and (3, 48) in the model",
    ),
    "head the other way round": (tensor("full.head.weight", lambda t: t.T), "full.head.weight is (48, 3) in the file"),
    "whole tensor of no parameter": (whole("norm.wieght", torch.ones(48)), "no parameter norm.wieght; perhaps norm.weight"),
    "whole tensor of an adapter's": (
        whole("blocks.0.attn.qkv.loca.updates.0.coefficients", torch.ones(20)),
        "the model has no parameter blocks.0.attn.qkv.loca",
    ),
    "whole tensor of another shape": (whole("norm.bias", torch.ones(47)), "full.norm.bias is (47,) in the file"),
    "whole names are not a list": (field("whole", "head"), "whole='head'"),
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
