"""Format version 2: every damage is refused in one sentence, before more memory is taken than the file may ask for."""

from __future__ import annotations

import random
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loca_vision import load_adapter, save_adapter
from loca_vision.formats.packed.gaps import Row, check_size, packed_cells, unpacked_cells
from loca_vision.formats.packed.numbers import inflated
from loca_vision.formats.packed.reading import open_adapter
from mutate_files import Mutation, load_or_refuse
from mutate_files import facts as tensors_of
from support.adapter_files import (
    NAME,
    PROJECTIONS,
    Breaker,
    Q,
    about,
    assert_same,
    both,
    config,
    facts,
    field,
    tensor,
    tensors,
    tiny,
    trained,
)
from support.packed_files import in_stream, raw_bytes, table
from support.time_limit import within

LAST = PROJECTIONS[-1]
LORA = {"r": 1, "alpha": 1.0, "targets": ["q", "v"], "use_dora": False, "seed": 0}


def bit(number: int) -> Callable[[bytes], bytes]:
    """Invert one bit; a negative number counts from the end."""

    def changed(data: bytes) -> bytes:
        flipped, place = bytearray(data), number % (8 * len(data))
        flipped[place // 8] ^= 1 << place % 8
        return bytes(flipped)

    return changed


def last_one(data: bytes) -> bytes:
    """Without the last bit that is set."""
    at = max(i for i in range(8 * len(data)) if data[i // 8] >> i % 8 & 1)
    return bit(at)(data)


def one_too_far(data: bytes) -> bytes:
    """The last cell of the first projection behind the end of its matrix."""
    rows = [Row(name, (48, 48), 20) for name in PROJECTIONS]
    first, *others = unpacked_cells(torch.tensor(list(data), dtype=torch.uint8), rows)
    first[-1] = 48 * 48
    return bytes(packed_cells([one.long() for one in (first, *others)], rows).tolist())


def row(change: Callable[[list[Any]], object]) -> Breaker:
    """Edit the row of the first projection."""
    return table(lambda rows: change(rows[Q]))


BROKEN: dict[str, tuple[Breaker, str]] = {
    # Metadata
    "version 3": (field("format_version", 3), "format_version=3: this library reads versions 1 and 2"),
    "version 1": (field("format_version", 1), "the fields ['coefficients', 'shapes'] are missing or unknown"),
    "shapes as well": (field("shapes", {Q: [48, 48]}), "the fields ['shapes'] are missing or unknown"),
    "no dtype": (about(lambda m: m.pop("coefficients")), "the fields ['coefficients'] are missing or unknown"),
    "another dtype": (field("coefficients", "bfloat16"), "coefficients='bfloat16': they are stored as float16 or int8"),
    "dtype is a list": (field("coefficients", ["int8"]), "coefficients=['int8']"),
    "8 bits without scales": (field("coefficients", "int8"), "the tensor scales is missing"),
    "an unknown method": (field("method", "magic"), "method='magic': this library reads"),
    "a method of other tensors": (
        both(field("method", "lora"), field("config", LORA)),
        "method='lora': version 2 is for coefficients at locations",
    ),
    "counts by name": (config("n_components", dict.fromkeys(PROJECTIONS, 20)), "n_components is a whole number, or null"),
    "another count": (config("n_components", 21), f"projections['{Q}'] has 20 components: by the settings it has 21"),
    "a count of no number": (config("n_components", "20"), "n_components='20'"),
    "settings are a list": (field("config", []), "config: its fields are"),
    "settings of a component are a number": (field("config", {"unet": 3}), "belongs to none of the components unet"),
    # Tensors
    **{f"no {key}": (tensors(lambda t, key=key: t.pop(key)), f"the tensor {key} is missing")  # type: ignore[misc]
       for key in ("projections", "cells", "coefficients")},
    "an unknown tensor": (tensors(lambda t: t.update(more=torch.ones(1))), "the tensor more is unknown"),
    "a tensor of version 1": (tensors(lambda t: t.update({f"{Q}.locations": torch.ones(1)})), "q.locations is unknown"),
    "scales of float16": (tensors(lambda t: t.update(scales=torch.ones(4))), "the tensor scales is unknown"),
    "cells as int8": (tensor("cells", lambda t: t.view(torch.int8)), "cells has dtype I8 and shape"),
    "cells as a matrix": (tensor("cells", lambda t: t[None]), "expected a row of U8"),
    "cells as a number": (tensor("cells", lambda t: t[0]), "expected a row of U8"),
    "no head": (tensors(lambda t: t.pop("full.head.bias")), "the tensor full.head.bias is missing"),
    "an unnamed head": (about(lambda m: m["whole"].pop()), "is unknown"),
    # The table of projections
    "table in no stream": (raw_bytes("projections", lambda data: b"x" + data), "projections is not a sound zlib stream"),
    "table cut": (raw_bytes("projections", lambda data: data[:-1]), "projections is not a sound zlib stream: it is cut short"),
    "no table": (raw_bytes("projections", lambda data: b""), "projections is not a sound zlib stream: it is cut short"),
    "bytes behind the table": (raw_bytes("projections", lambda data: data + b"xy"), "projections has 2 bytes behind"),
    "table of 9 MiB": (in_stream("projections", lambda text: text + b" " * 9 * 2**20), "projections has more than 8388608"),
    "table is not JSON": (in_stream("projections", lambda text: text[:-1]), "line 1"),
    "table is not UTF-8": (in_stream("projections", lambda text: text.replace(b"blocks", b"bl\xffcks", 1)), "utf-8"),
    "table is a list": (in_stream("projections", lambda text: b"[]"), "projections is not an object of projections"),
    "table is empty": (in_stream("projections", lambda text: b"{}"), "shapes: it names no projection"),
    "table is deep": (in_stream("projections", lambda text: b"[" * 10**5 + b"]" * 10**5), "nested too deeply"),
    "a projection twice": (in_stream("projections", lambda text: text.replace(b".v", b".q")), "comes twice"),
    "a row is a number": (table(lambda rows: rows.update({Q: 20})), f"projections['{Q}']=20: its shape and then"),
    "a row is empty": (row(list.clear), f"projections['{Q}']=[]: its shape and then"),
    "a row of no sizes": (row(lambda r: r.__delitem__(slice(2))), f"shapes['{Q}']=[]"),
    "count 0": (row(lambda r: r.__setitem__(-1, 0)), "its number of components, from 1 up"),
    "count true": (row(lambda r: r.__setitem__(-1, True)), "its number of components, from 1 up"),
    "count 20.0": (row(lambda r: r.__setitem__(-1, 20.0)), "its number of components, from 1 up"),
    "size 0": (row(lambda r: r.__setitem__(0, 0)), f"shapes['{Q}']=[0, 48]"),
    "more cells than int32 numbers": (row(lambda r: r.__setitem__(0, 2**31)), f"shapes['{Q}']"),
    "more components than cells": (row(lambda r: r.__setitem__(slice(2), [4, 4])), f"{Q} has 20 components, of 4 x 4"),
    "one projection less": (table(lambda rows: rows.pop(LAST)), "cells has"),
    "one projection more": (table(lambda rows: rows.update(more=[48, 48, 20])), "cells has"),
    # Cells
    "a byte less": (raw_bytes("cells", lambda data: data[:-1]), f"{LAST}: cells ends before its last one"),
    "a byte more": (raw_bytes("cells", lambda data: data + b"\0"), f"{LAST}: cells has bytes behind its last one"),
    "padding that is not zero": (raw_bytes("cells", bit(-1)), f"{LAST}: cells has bits behind its last one"),
    "a bit lost": (raw_bytes("cells", last_one), f"{LAST}: cells ends before its last one"),
    "half the bytes": (raw_bytes("cells", lambda data: data[: len(data) // 2]), "cells has"),
    "far too many bytes": (raw_bytes("cells", lambda data: data + bytes(99)), "80 components take from"),
    "cells beyond the matrix": (raw_bytes("cells", one_too_far), f"{Q}: its cells go up to 2304: a 48 x 48 matrix has"),
    # Coefficients
    "coefficients in no stream": (raw_bytes("coefficients", lambda data: b"x" + data), "coefficients is not a sound zlib"),
    "coefficients cut": (raw_bytes("coefficients", lambda data: data[:-1]), "coefficients is not a sound zlib stream: it"),
    "bytes behind": (raw_bytes("coefficients", lambda data: data + b"x"), "coefficients has 1 bytes behind its zlib stream"),
    "padded": (raw_bytes("coefficients", lambda data: data + bytes(1400)), "a stream of 160 takes at most 1344"),
    "one byte short": (in_stream("coefficients", lambda data: data[:-1]), "coefficients has 159 bytes in its zlib stream"),
    "one byte long": (in_stream("coefficients", lambda data: data + b"x"), "coefficients has more than 160 bytes"),
    "a checksum that is wrong": (raw_bytes("coefficients", bit(-1)), "coefficients is not a sound zlib stream"),
    "NaN": (in_stream("coefficients", lambda data: b"\xff" * 160), f"{Q}.coefficients holds NaN or infinity"),
}  # fmt: skip
BROKEN_SMALL: dict[str, tuple[Breaker, str]] = {
    "no scales": (tensors(lambda t: t.pop("scales")), "the tensor scales is missing"),
    "a scale less": (tensor("scales", lambda t: t[1:]), "scales has shape (3,): the file has 4 projections"),
    "scales in float64": (tensor("scales", lambda t: t.double()), "scales has dtype F64"),
    "a scale of NaN": (tensor("scales", lambda t: t * float("nan")), f"{Q}.coefficients holds NaN or infinity"),
    "a scale too large": (tensor("scales", lambda t: t * 0 + 3e38), f"{Q}.coefficients holds NaN or infinity"),
    "called float16": (field("coefficients", "float16"), "the tensor scales is unknown"),
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A model that no test here may change, since all loads into it are refused."""
    return tiny()


@pytest.fixture(scope="module")
def untouched(model: nn.Module) -> dict[str, Any]:
    return facts(model)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    made, folder = trained(), tmp_path_factory.mktemp("good")
    return {name: save_adapter(made, folder / NAME, dtype=getattr(torch, name)).read_bytes() for name in ("float16", "int8")}


@pytest.mark.parametrize(
    ("stored", "case"), [*(("float16", case) for case in BROKEN), *(("int8", case) for case in BROKEN_SMALL)]
)
def test_a_damaged_file_is_refused_and_nothing_is_touched(
    stored: str, case: str, good: dict[str, bytes], model: nn.Module, untouched: dict[str, Any], tmp_path: Path
) -> None:
    breaker, words = (BROKEN if stored == "float16" else BROKEN_SMALL)[case]
    file = tmp_path / NAME
    file.write_bytes(breaker(good[stored]))
    with within(20), pytest.raises(ValueError) as caught:
        load_adapter(model, file)
    sentence = str(caught.value)
    assert sentence.startswith(f"{file}: ") and words in sentence
    assert sentence.isprintable() and len(sentence) < len(str(file)) + 700
    assert_same(model, untouched)


@pytest.mark.parametrize("stored", ["float16", "int8"])
def test_bytes_at_random(stored: str, good: dict[str, bytes], tmp_path: Path) -> None:
    file, model = tmp_path / "damaged.safetensors", tiny()
    before, loaded = tensors_of(model), 0
    for seed in range(200):
        file.write_bytes(Mutation(seed)(good[stored]))
        try:
            loaded += load_or_refuse(model, file, before)
        except BaseException as error:
            raise AssertionError(f"Mutation({seed})") from error
    assert loaded > 0, "no mutation left the file sound: nothing but refusals was tried"


@pytest.mark.parametrize("key", ["projections", "cells", "coefficients"])
def test_bytes_at_random_in_one_tensor(key: str, good: dict[str, bytes], tmp_path: Path) -> None:
    """Whose streams are whole again afterwards, so that what is in them is what is tried."""
    file, model = tmp_path / "damaged.safetensors", tiny()
    before = tensors_of(model)
    for seed in range(150):
        drawn = random.Random(seed)

        def change(data: bytes, drawn: random.Random = drawn) -> bytes:
            changed, at = bytearray(data), drawn.randrange(len(data))
            changed[at : at + drawn.choice([0, 1, 1, 2])] = drawn.randbytes(drawn.choice([0, 1, 1, 2]))
            return bytes(changed)

        breaker = raw_bytes(key, change) if key == "cells" else in_stream(key, change)
        file.write_bytes(breaker(good["float16"]))
        try:
            load_or_refuse(model, file, before)
        except BaseException as error:
            raise AssertionError(f"{key}, {seed}") from error


def test_counts_are_bounded_before_anything_is_read(good: dict[str, bytes], tmp_path: Path) -> None:
    """By the header alone: 2^31 components would take 16 GiB."""
    file = tmp_path / NAME
    huge = both(table(lambda rows: rows.update({name: [2**16, 2**15, 2**31] for name in rows})), config("n_components", 2**31))
    file.write_bytes(huge(good["float16"]))
    with pytest.raises(ValueError, match="8589934592 components take from"), open_adapter(file):
        pytest.fail("it was opened")


def test_a_stream_is_not_inflated_beyond_what_it_may_hold() -> None:
    bomb = torch.frombuffer(bytearray(zlib.compress(bytes(10**8), 9)), dtype=torch.uint8)
    assert len(bomb) < 10**5
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="coefficients has more than 1000 bytes"):
            inflated("coefficients", bomb, 1000)
        assert tracemalloc.get_traced_memory()[1] < 5 * 10**6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("seed", range(20))
def test_any_cells_are_packed_into_what_is_allowed(seed: int) -> None:
    """Of the sizes that `check_size` lets through, no byte can be spared and none is missed."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 60, (5, 2), generator=generator).tolist()
    counts = [1 + int(torch.randint(p * q, (), generator=generator)) ** (seed % 3 > 0) for p, q in sizes]
    rows = [Row(str(i), (p, q), count) for i, ((p, q), count) in enumerate(zip(sizes, counts, strict=True))]
    cells = [torch.randint(p * q, (c,), generator=generator).sort().values for (p, q), c in zip(sizes, counts, strict=True)]
    if seed % 4 == 0:
        cells = [torch.full_like(one, p * q - 1) for one, (p, q) in zip(cells, sizes, strict=True)]
    data = packed_cells(cells, rows)
    check_size(len(data), rows)
    for found, one in zip(unpacked_cells(data, rows), cells, strict=True):
        assert torch.equal(found, one.int())
    with pytest.raises(ValueError, match="cells"):
        unpacked_cells(data[:-1], rows)


def test_the_largest_matrix() -> None:
    rows = [Row("a", (2**16, 2**15), 1), Row("b", (2**15, 2**16), 3)]
    cells = [torch.tensor([2**31 - 1]), torch.tensor([0, 2**31 - 1, 2**31 - 1])]
    found = unpacked_cells(packed_cells(cells, rows), rows)
    assert [one.tolist() for one in found] == [one.tolist() for one in cells]


def test_the_good_files_are_not_broken(good: dict[str, bytes], tmp_path: Path) -> None:
    for raw in good.values():
        (tmp_path / NAME).write_bytes(raw)
        assert load_adapter(tiny(), tmp_path / NAME) == PROJECTIONS
