"""Broken adapter files of every kind: refused in one sentence, before anything is touched or allocated."""

import json
import math
import resource

import pytest
import safetensors
import safetensors.torch
import torch

from loca_vision import active_adapters, inject, load_adapter, save_adapter
from loca_vision.commands.inspect_file import describe
from support.formulas import KINDS, stir
from support.time_limit import within
from support.timm_models import tiny

KEY = "loca_adapter_metadata"
Q = "blocks.0.attn.q"
TENSORS = {  # of every kind one tensor after the other, as the file has them for one projection
    "loca": ("coefficients", "locations"),
    "sdctft": ("coefficients", "locations"),
    "fourierft": ("coefficients", "locations"),
    "waveft": ("coefficients", "locations"),
    "lora": ("up", "down"),
    "dora": ("up", "down", "magnitude"),
    "selora haar": ("up_coefficients", "down_coefficients"),
    "selora dora": ("up_coefficients", "down_coefficients", "magnitude"),
}
CELLS = {"loca": f"{Q}.locations", "sdctft": f"{Q}.locations", "fourierft": f"{Q}.locations", "selora haar": "cells.48x3"}
every_tensor = pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in TENSORS.items() for name in names])
every_kind = pytest.mark.parametrize("kind", TENSORS)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Tensors and metadata of an adapter of a kind, written once."""
    made = {}

    def parts(kind):
        if kind not in made:
            model = tiny("vit")
            inject(model, KINDS[kind])
            file = save_adapter(stir(model), tmp_path_factory.mktemp("kind"))
            with safetensors.safe_open(file, "pt") as opened:
                made[kind] = safetensors.torch.load_file(file), json.loads(opened.metadata()[KEY])
        tensors, about = made[kind]
        return {key: value.clone() for key, value in tensors.items()}, json.loads(json.dumps(about))

    return parts


@pytest.fixture(scope="module")
def model():
    """One that no test here may change, since all loads into it are refused."""
    return tiny("vit")


@pytest.fixture
def refused(tmp_path, model):
    """Loads what it is given, and looks whether the sentence is right and the model as it was.

    `alone` is whether the file can be told to be broken without a model, too.
    """

    def check(tensors, about, words, *, alone=True):
        file = tmp_path / "adapter.safetensors"
        safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, file, {KEY: json.dumps(about)})
        before = {key: value.clone() for key, value in model.state_dict().items()}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for read in (lambda: load_adapter(model, file), lambda: describe(file))[: 2 if alone else 1]:
            with within(5), pytest.raises(ValueError, match=words) as caught:
                read()
            assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200 * 1024  # KiB
        assert list(model.state_dict()) == list(before) and not active_adapters(model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())

    return check


@every_tensor
def test_a_tensor_is_missing(kind, name, good, refused):
    tensors, about = good(kind)
    del tensors[f"{Q}.{name}"]
    refused(tensors, about, rf"{Q}\.{name} is missing")


@every_kind
def test_a_tensor_too_many(kind, good, refused):
    tensors, about = good(kind)
    refused(tensors | {f"{Q}.more": torch.ones(2)}, about, rf"{Q}\.more is unknown")


@every_tensor
def test_another_shape(kind, name, good, refused):
    tensors, about = good(kind)
    key = f"{Q}.{name}"
    for changed in (tensors[key][1:], tensors[key].unsqueeze(0), torch.cat([tensors[key]] * 2)):
        refused(tensors | {key: changed}, about, rf"{Q}\.{name} has shape .* by the settings it is")


@every_tensor
def test_another_dtype(kind, name, good, refused):
    tensors, about = good(kind)
    key = f"{Q}.{name}"
    wrong = [torch.bfloat16, torch.float64, torch.int8] + [torch.float16] * (name == "magnitude")
    for dtype in wrong:
        refused(tensors | {key: tensors[key].to(dtype)}, about, rf"{Q}\.{name} has dtype")


@every_tensor
@pytest.mark.parametrize("value", (math.nan, -math.inf))
def test_what_is_not_finite(kind, name, value, good, refused):
    tensors, about = good(kind)
    if name == "locations":
        return refused(tensors | {f"{Q}.locations": tensors[f"{Q}.locations"].float()}, about, "has dtype F32")
    tensors[f"{Q}.{name}"].view(-1)[1] = value
    return refused(tensors, about, rf"{Q}\.{name} holds NaN or infinity")


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("value", (-1, 2**31 - 1))
def test_cells_outside(kind, value, good, refused):
    tensors, about = good(kind)
    tensors[CELLS[kind]][2] = value
    refused(tensors, about, rf"{CELLS[kind]} holds {value}: a 48 x \d+ matrix has cells 0 to")


def test_cells_are_there_once_for_every_shape(good, refused):
    tensors, about = good("selora haar")
    refused({k: v for k, v in tensors.items() if k != "cells.3x48"}, about, r"cells\.3x48 is missing")
    refused(tensors | {"cells.3x49": tensors["cells.3x48"].clone()}, about, r"cells\.3x49 is unknown")
    refused(tensors | {"cells.3x48": tensors["cells.3x48"].long()}, about, r"cells\.3x48 has dtype I64: expected I32")


@every_kind
def test_what_overflows_as_an_update(kind, good, refused):
    tensors, about = good(kind)
    for name in TENSORS[kind]:
        if name not in ("locations", "magnitude"):
            tensors[f"{Q}.{name}"].fill_(1e38)
    refused(tensors, about, rf"{Q}.*overflow")


ABSURD = {
    "loca": {"n_components": (10**9, 10**18, 0, -1, 1.5, "40", None, [40]), "scale": (0, "1", None)},
    "sdctft": {"n_components": (10**9, 0), "n_bands": (0, 10**9), "energy_share": (2, "x"), "budgets": ([1, 1], {"a": 1})},
    "fourierft": {"n_components": (10**9, 0), "coefficient_init": ("ones", None), "scale": (0,)},
    "waveft": {"n_components": (10**9, 0), "wavelet": ("db1024", "", None, ["db1"], {}), "scale": (0,)},
    "lora": {"r": (10**9, 10**18, 10**30, 49, 0, -3, 2.0, True, "3", None), "alpha": (0, "x"), "use_dora": (1, None)},
    "dora": {"r": (10**9, 10**18), "use_dora": (False,)},
    "selora haar": {"r": (10**9, 10**18, 10**30, 0, None), "eta": (1, -1, 0.99999, "0.4", None, 10**9), "basis": ("dct", [])},
    "selora dora": {"r": (10**9,), "eta": (10**9,), "use_dora": (False, "yes")},
}


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in ABSURD.items() for field in fields])
def test_absurd_settings(kind, field, good, refused):
    for value in ABSURD[kind][field]:
        tensors, about = good(kind)
        about["config"][field] = value
        refused(tensors, about, r"=|components, of|is unknown|by the settings")


@every_kind
def test_fields_missing_and_unknown(kind, good, refused):
    for change in (lambda c: c.pop("scale" if "scale" in c else "alpha"), lambda c: c.update(more=1), lambda c: c.clear()):
        tensors, about = good(kind)
        change(about["config"])
        refused(tensors, about, "config: its fields are")


@every_kind
@pytest.mark.parametrize("shape", ([0, 48], [48, "48"], [2**40, 2**40]))
def test_absurd_shapes(kind, shape, good, refused):
    tensors, about = good(kind)
    about["shapes"][Q] = shape
    refused(tensors, about, r"shapes\['blocks\.0\.attn\.q'\]=")


@every_kind
@pytest.mark.parametrize("shape", ([2**31, 1], [1, 2**31]))
def test_the_largest_shapes(kind, shape, good, refused, tmp_path):
    """What fits into a spectrum of any size can be told without building a matrix of that size."""
    tensors, about = good(kind)
    about["shapes"][Q] = shape
    spectrum = TENSORS[kind][0] == "coefficients"
    words = "is .* in the file and" if spectrum else "by the settings|matrix has at most|is missing"
    refused(tensors, about, words, alone=not spectrum)
    if spectrum:
        with within(5):
            assert f"{shape[0]} x {shape[1]}" in describe(tmp_path / "adapter.safetensors")


@pytest.mark.parametrize("method", ("", "LoRA", None, 3, ["lora"], "kronecker"))
def test_a_kind_there_is_not(method, good, refused):
    tensors, about = good("lora")
    refused(tensors, about | {"method": method}, "method=.*: this library reads 'fourierft', 'loca', 'lora'")


@every_kind
def test_another_kind_s_name(kind, good, refused):
    tensors, about = good(kind)
    other = "selora" if about["method"] == "lora" else "lora"
    refused(tensors, about | {"method": other}, "config: its fields are")
