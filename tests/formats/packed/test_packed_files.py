"""Format version 2: what is saved packed comes back, in fewer bytes."""

from __future__ import annotations

import json
import logging
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import loca_vision.diffusers as loca
from loca_vision import (
    AdapterStore,
    FourierFTConfig,
    LoCAConfig,
    LoRAConfig,
    SDCTFTConfig,
    SeLoRAConfig,
    adapters,
    inject,
    load_adapter,
    per_sample,
    read_updates,
    save_adapter,
)
from loca_vision.formats.adapter_file import METADATA_KEY
from loca_vision.methods.registry import KINDS
from loca_vision.methods.sparse_config import SparseConfig
from loca_vision.model.state import state_of
from support.adapter_files import IMAGES, NAME, PROJECTIONS, Q, output, split, tiny, trained
from support.packed_files import unpacked_by_hand

GOLDEN = Path(__file__).parents[2] / "golden"


@dataclass(frozen=True)
class Registered(LoCAConfig):
    """A method that another package defines, with the layout of the sparse ones."""

    method: ClassVar[str] = "registered"


class OtherLayout(Registered):
    """One with a layout of its own."""

    method: ClassVar[str] = "other-layout"

    def file_layout(self, shapes: Any) -> Any:
        return super().file_layout(shapes)


CONFIGS: dict[str, SparseConfig] = {
    "loca": LoCAConfig(n_components=20, scale=2.0),
    "sdctft": SDCTFTConfig(n_components=40),
    "fourierft": FourierFTConfig(n_components=33, scale=30.0),
    "registered": Registered(n_components=11, targets=("q", "fc1")),
    "one component": LoCAConfig(n_components=1, targets=("v",), location_gradient="forward", seed=2**63 - 1),
    "every cell": LoCAConfig(n_components=48 * 48, targets=("out", "q")),
    "counts by pattern": LoCAConfig(n_components={"blocks.0.*": 5, "*.v": 2000, "*": 900}, targets=("q", "k", "v")),
    "layers": LoCAConfig(n_components=9, layers=("blocks.1",)),
}


def stirred(config: SparseConfig) -> nn.Module:
    """A model with random coefficients, some of them in one cell."""
    model = tiny()
    inject(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for update in adapters(model).values():
            update.coefficients.copy_(torch.randn(update.coefficients.shape, generator=generator) * 0.3)
            update.locations[: len(update.locations) // 3] = update.locations[0].clone()
        model.head.weight.normal_(generator=generator)
    return model


def in_order(update: Any) -> tuple[Tensor, Tensor]:
    """Flat cells, ascending, and the coefficients there."""
    cells = update.cells[:, 0] * update.shape[1] + update.cells[:, 1]
    found = cells.sort(stable=True)
    return found.values, update.coefficients.detach()[found.indices]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (Registered, OtherLayout):
        monkeypatch.setitem(KINDS, kind.method, kind)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
@pytest.mark.parametrize("case", CONFIGS)
def test_what_is_packed_comes_back(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, copy = stirred(CONFIGS[case]), tiny()
    file = save_adapter(model, tmp_path / NAME, dtype=dtype)
    assert load_adapter(copy, file) == tuple(adapters(model))
    assert torch.equal(copy.head.weight, model.head.weight)
    by_hand = unpacked_by_hand(file.read_bytes())
    for name, update in adapters(copy).items():
        cells, values = in_order(adapters(model)[name])
        (found_cells, found) = in_order(update)
        assert torch.equal(found_cells, cells) and found_cells.tolist() == by_hand[name][1]
        assert torch.equal(found, torch.tensor(by_hand[name][0]))
        most = values.abs().max() / 127 / 2 * 1.0001 if dtype == torch.int8 else values.abs().max() * 2**-11
        assert (found - values).abs().max() <= most
    assert settings(copy) == settings(model).for_updates(adapters(model))
    if dtype == torch.float16:
        assert save_adapter(copy, tmp_path / "again.safetensors", dtype=dtype).read_bytes() == file.read_bytes()


def settings(model: nn.Module) -> Any:
    record = state_of(model)
    assert record is not None
    return record.adapters["default"].config


def test_the_header(tmp_path: Path) -> None:
    """Names stand in it once, or not at all."""
    file = save_adapter(stirred(CONFIGS["counts by pattern"]), tmp_path / NAME, dtype=torch.float16)
    header = json.loads(split(file.read_bytes())[0])
    assert set(header) - {"__metadata__"} == {"projections", "cells", "coefficients", "full.head.bias", "full.head.weight"}
    about = json.loads(header["__metadata__"][METADATA_KEY])
    assert about["format_version"] == 2 and about["coefficients"] == "float16" and "shapes" not in about
    assert about["config"]["n_components"] is None and "blocks.0" not in json.dumps(header)


@pytest.mark.parametrize(("count", "dtype", "most"), [(100, torch.float16, 9_000), (100, torch.int8, 7_000)])
def test_bytes_of_2400_components_of_a_vit_s(count: int, dtype: torch.dtype, most: int, tmp_path: Path) -> None:
    model = timm.create_model("vit_small_patch16_224", num_classes=0)
    assert small_file(model, count, dtype, tmp_path) < most


@pytest.mark.parametrize(("dtype", "most"), [(torch.float16, 210_000), (torch.int8, 150_000)])
def test_bytes_of_72000_components(dtype: torch.dtype, most: int, tmp_path: Path) -> None:
    """On 24 matrices of 768 x 768."""
    model = timm.create_model("vit_base_patch16_224", num_classes=0, mlp_ratio=0.1, class_token=False, global_pool="avg")
    assert small_file(model, 3000, dtype, tmp_path) < most


def small_file(model: nn.Module, count: int, dtype: torch.dtype, folder: Path) -> int:
    inject(model, LoCAConfig(n_components=count))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for update in adapters(model).values():
            update.coefficients.copy_(torch.randn(count, generator=generator) * 0.02)
    assert len(adapters(model)) == 24
    return save_adapter(model, folder / NAME, dtype=dtype).stat().st_size


def test_eight_bits_say_what_they_lose(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of cosines at different cells it is the relative error of the update, in the Frobenius norm."""
    model, copy = trained(LoCAConfig(n_components=5)), tiny()
    with torch.no_grad():
        for number, update in enumerate(adapters(model).values()):
            update.locations.copy_(torch.linspace(0, 1, 5)[:, None].expand(5, 2))
            update.coefficients.mul_(10.0**number)
    with caplog.at_level(logging.WARNING, "loca_vision"):
        load_adapter(copy, save_adapter(model, tmp_path / NAME, dtype=torch.int8))
    pairs = [(adapters(model)[name].delta().detach(), adapters(copy)[name].delta().detach()) for name in PROJECTIONS]
    lost = sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)
    assert 1e-4 < lost**0.5 < 0.01
    said = f"in 8 bits the coefficients differ by {100 * lost**0.5:.2f} % (root mean square) from those in memory"
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-30, 3e38])
def test_extreme_values_in_eight_bits(value: float, tmp_path: Path) -> None:
    """Nothing overflows, and the largest of a projection keeps its value as nearly as float32 holds a 127th of it."""
    model, copy = stirred(LoCAConfig(n_components=3, scale=1e-8)), tiny()
    with torch.no_grad():
        adapters(model)[Q].coefficients.copy_(torch.tensor([0.0, value, 0.0]))
    load_adapter(copy, save_adapter(model, tmp_path / NAME, dtype=torch.int8))
    found = adapters(copy)[Q].coefficients.abs().max()
    torch.testing.assert_close(found, torch.tensor(value).abs(), rtol=1e-5, atol=1e-43)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_new_tensors_are_on_the_cpu_whatever_is_chosen_outside(dtype: torch.dtype, tmp_path: Path) -> None:
    model, copy = trained(), tiny()
    wanted = save_adapter(model, tmp_path / "wanted.safetensors", dtype=dtype)
    with torch.device("meta"), torch.inference_mode():
        load_adapter(copy, save_adapter(model, tmp_path / NAME, dtype=dtype))
    assert (tmp_path / NAME).read_bytes() == wanted.read_bytes()
    assert all(update.coefficients.device.type == "cpu" and update.learns() for update in adapters(copy).values())
    copy(IMAGES).sum().backward()  # what was made in inference mode would refuse


def test_methods_of_other_layouts(tmp_path: Path) -> None:
    """They have no 8 bits, and their float16 is version 1."""
    for config in (LoRAConfig(r=2), SeLoRAConfig(r=2), OtherLayout(n_components=4)):
        model = tiny()
        inject(model, config)
        with pytest.raises(
            ValueError, match=rf"^dtype=torch\.int8: {config.method} is stored as torch\.float32 or torch\.float16$"
        ):
            save_adapter(model, tmp_path / "new" / NAME, dtype=torch.int8)
        assert not (tmp_path / "new").exists()
        file = save_adapter(model, tmp_path / NAME, dtype=torch.float16)
        about = json.loads(json.loads(split(file.read_bytes())[0])["__metadata__"][METADATA_KEY])
        assert about["format_version"] == 1
        load_adapter(tiny(), file)


def test_float16_of_version_1_is_read(tmp_path: Path) -> None:
    """As 0.1.0 wrote it."""
    model, copy = trained(), tiny()
    raw = save_adapter(model, tmp_path / NAME).read_bytes()
    values = {k: v.half() if k.endswith("coefficients") else v for k, v in safetensors.torch.load(raw).items()}
    safetensors.torch.save_file(values, tmp_path / NAME, json.loads(split(raw)[0])["__metadata__"])
    load_adapter(copy, tmp_path / NAME)
    for name, update in adapters(copy).items():
        assert torch.equal(update.coefficients, adapters(model)[name].coefficients.half().float())
    torch.testing.assert_close(output(copy), output(model), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_pipelines_with_components_and_convolutions(dtype: torch.dtype, tmp_path: Path) -> None:
    made = runpy.run_path(str(GOLDEN / "make_own.py"))
    pipe, copy = made["Pipeline"](), made["Pipeline"]()
    for component, model in pipe.components.items():
        layers = ("*attn*", "*.proj_in") if component == "unet" else None
        inject(model, LoCAConfig(n_components={"*.q": 5, "*": 9}, targets=("q", "v"), layers=layers, scale=3.0))
        made["stirred"](model, 2)
    file = loca.save_loca_weights(pipe, tmp_path, dtype=dtype)
    loca.load_loca_weights(copy, file, "mine")
    assert "unet.down_blocks.0.attentions.0.proj_in" in unpacked_by_hand(file.read_bytes())
    for component, model in pipe.components.items():
        for name, update in adapters(copy.components[component], "mine").items():
            assert torch.equal(in_order(update)[0], in_order(adapters(model)[name])[0])
            torch.testing.assert_close(update.delta(), adapters(model)[name].delta(), rtol=0, atol=5e-3)
    updates = read_updates(file).updates
    assert len(updates) == sum(len(adapters(model)) for model in pipe.components.values())
    again = loca.save_loca_weights(copy, tmp_path / "again", "mine", dtype=dtype)
    assert unpacked_by_hand(again.read_bytes()).keys() == unpacked_by_hand(file.read_bytes()).keys()


def test_state_dicts(tmp_path: Path) -> None:
    """With the metadata they are read; without it nobody knows what is packed."""
    made = runpy.run_path(str(GOLDEN / "make_own.py"))
    file, pipe = GOLDEN / "own" / "packed.safetensors", made["Pipeline"]()
    tensors = safetensors.torch.load_file(file)
    with pytest.raises(ValueError, match=f"^state dict: its components are packed, and only '{METADATA_KEY}' says how: load"):
        loca.load_loca_weights(pipe, tensors)
    metadata = json.loads(split(file.read_bytes())[0])["__metadata__"]
    loca.load_loca_weights(pipe, tensors | metadata)
    loca.load_loca_weights(pipe, file, "other")
    for model in pipe.components.values():
        for name, update in adapters(model, "default_0").items():
            assert torch.equal(update.coefficients, adapters(model, "other")[name].coefficients)


def test_stores_hold_packed_files(tmp_path: Path) -> None:
    """Of the same settings, and of different layers that only the table of projections names."""
    model, wanted = tiny(), []
    for name, layer in (("a", 0), ("b", 1), ("c", 1)):
        other, alone = trained(LoCAConfig(n_components=20, layers=(f"blocks.{layer}",)), seed=ord(name)), tiny()
        load_adapter(alone, save_adapter(other, tmp_path / f"{name}.safetensors", dtype=torch.float16))
        wanted.append(output(alone)[:1])
    AdapterStore(tmp_path, capacity_bytes=10**9, base=model)
    with torch.no_grad(), per_sample(model, ["a", "b", "c"]):
        found = model(IMAGES[:1].expand(3, -1, -1, -1))
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-4, atol=1e-4)
