"""save_adapter and load_adapter: round trips."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loca_vision import LoCAConfig, active_adapters, adapters, load_adapter, save_adapter
from loca_vision.formats.adapter_file import FILE_NAME, METADATA_KEY
from loca_vision.model.heads import classifier
from support.adapter_files import (
    CONFIG,
    IMAGES,
    NAME,
    PROJECTIONS,
    Q,
    field,
    output,
    split,
    tiny,
    trained,
)

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
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3])
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
    load_adapter(copy, file)
    for projection, spectrum in adapters(copy).items():
        mine = adapters(model)[projection]
        order = (mine.cells[:, 0] * 48 + mine.cells[:, 1]).sort(stable=True).indices
        assert spectrum.coefficients.dtype == torch.float32
        assert torch.equal(spectrum.cells, mine.cells[order])
        assert torch.equal(spectrum.coefficients, mine.coefficients[order].half().float())
    with torch.no_grad():
        for spectrum in adapters(model).values():
            spectrum.coefficients.copy_(spectrum.coefficients.half())
    torch.testing.assert_close(output(copy), output(model))


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
