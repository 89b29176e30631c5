"""Adapter files that this library wrote once, read for ever: `tests/golden/own`, which is never made again."""

from __future__ import annotations

import json
import runpy
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

import loca_vision.diffusers as loca
from loca_vision import active_adapters, adapters, load_adapter
from loca_vision.commands.main import main
from loca_vision.formats.conversion.weight_deltas import read_source
from support.packed_files import unpacked_by_hand

GOLDEN = Path(__file__).parents[1] / "golden"
OWN = GOLDEN / "own"
made: dict[str, Any] = runpy.run_path(str(GOLDEN / "make_own.py"))


def expected(name: str, file: str = "expected") -> dict[str, Tensor]:
    """By projection."""
    tensors = safetensors.torch.load_file(OWN / f"{file}.safetensors")
    return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and found
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [*made["METHODS"], *made["LATER"]])
def test_a_file_of_each_method(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = made["vit"]()
    load_adapter(model, OWN / f"{method}.safetensors")
    assert_same(made["products"](model), expected(method, "later-expected" if method in made["LATER"] else "expected"))
    assert torch.equal(model.head.weight, torch.full_like(model.head.weight, 0.25))
    assert active_adapters(model) == {"default": 1.0}
    assert main(["inspect", str(OWN / f"{method}.safetensors")]) == 0
    assert "blocks.0.attn.q" in capsys.readouterr().out


@pytest.mark.parametrize("stored", ["float16", "int8"])
def test_a_packed_file(stored: str, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = made["vit"](), OWN / f"packed-{stored}.safetensors"
    load_adapter(model, file)
    assert_same(made["products"](model), expected(f"packed-{stored}", "packed-expected"))
    assert torch.equal(model.head.weight, torch.full_like(model.head.weight, 0.25))
    for name, (values, cells) in unpacked_by_hand(file.read_bytes()).items():
        update = adapters(model)[name]
        assert torch.equal(update.coefficients, torch.tensor(values))
        assert (update.cells[:, 0] * update.shape[1] + update.cells[:, 1]).tolist() == cells
    assert main(["inspect", str(file)]) == 0
    assert f"format version 2: 47 components in {stored}, " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "file"), [("pipeline", "expected"), ("layers", "layers-expected"), ("packed", "packed-expected")]
)
def test_a_file_of_a_pipeline(name: str, file: str) -> None:
    """Of 0.1.0, which wrote the names of the installed transformers, and of later ones."""
    pipe = made["Pipeline"]()
    loca.load_loca_weights(pipe, OWN / f"{name}.safetensors")
    for component, model in pipe.components.items():
        found = {key.removeprefix("text_model."): value for key, value in made["products"](model, "default_0").items()}
        wanted = {key: value for key, value in expected(name, file).items() if key.startswith(f"{component}.")}
        assert_same(found, {key.removeprefix(f"{component}.").removeprefix("text_model."): v for key, v in wanted.items()})
    source = read_source(OWN / f"{name}.safetensors")
    assert len(source.shapes) == sum(len(adapters(model, "default_0")) for model in pipe.components.values())


def test_what_the_files_say() -> None:
    with safe_open(OWN / "layers.safetensors", "pt") as opened:
        said = json.loads(opened.metadata()["loca_adapter_metadata"])
        keys = set(opened.keys())
    assert said["format_version"] == 1
    assert said["config"]["unet"]["layers"] == ["*attn*", "*.ff", "*.proj_in"]
    assert said["shapes"]["unet.down_blocks.0.attentions.0.proj_in"] == [16, 16, 1, 1]
    assert said["shapes"]["unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.fc1"] == [128, 16]
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.coefficients" in keys
    with safe_open(OWN / "loca.safetensors", "pt") as opened:
        assert "layers" not in json.loads(opened.metadata()["loca_adapter_metadata"])["config"]


def test_the_picture_of_a_file(tmp_path: Path) -> None:
    """A panel for each projection, with a dot where a component stands."""
    assert main(["inspect", str(OWN / "loca.safetensors"), "--picture", str(tmp_path / "spectra.png")]) == 0
    with Image.open(tmp_path / "spectra.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    assert min(pixels.shape) > 100 and (pixels < 128).sum() > 100 and (pixels > 250).mean() > 0.3


def test_the_picture_is_drawn_before_a_reader_of_the_lines_can_go_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture, there = tmp_path / "spectra.png", []

    class Reader(StringIO):
        def write(self, text: str) -> int:
            there.append(picture.exists())
            return super().write(text)

    monkeypatch.setattr("sys.stdout", Reader())
    assert main(["inspect", str(OWN / "loca.safetensors"), "--picture", str(picture)]) == 0
    assert there and all(there)
