"""LoCA methods of a pipeline: saving."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import (
    StableDiffusionPipeline,
)

import loca_vision.diffusers as loca
from loca_vision import LoCAConfig, adapters, inject
from support.loader import BOTH, TEXT, UNET
from support.pipelines import picture, quiet, stable_diffusion
from support.reference_weights import (
    FILE_NAME,
    METADATA_KEY,
    Made,
    adapter,
)


def test_what_is_saved_is_loaded_again(pipe: Any, first: Made, tmp_path: Path) -> None:
    pipe.load_loca_weights(first.state(), "first")
    shown = picture(pipe)
    file = pipe.save_loca_weights(tmp_path / "some" / "folder", "first")
    assert file == tmp_path / "some" / "folder" / FILE_NAME
    assert torch.equal(picture(pipe), shown)
    tensors = safetensors.torch.load_file(file)
    assert set(tensors) == set(first.tensors)
    assert all(torch.equal(tensors[key], value) for key, value in first.tensors.items())
    with safetensors.safe_open(file, "pt") as opened:
        about = json.loads(opened.metadata()[METADATA_KEY])
    for name in ("format_version", "method", "config", "shapes", "whole", "name"):
        assert about[name] == first.about[name], name
    pipe.unload_loca_weights()
    pipe.load_loca_weights(tmp_path / "some" / "folder")
    assert torch.equal(picture(pipe), shown)
    assert pipe.save_loca_weights(tmp_path, "default_0").read_bytes() != b""


def test_settings_of_each_component_come_back(pipe: Any, tmp_path: Path) -> None:
    unet = LoCAConfig(n_components={"mid*": 3, "*": 5}, scale=0.25, targets=("q", "k"), location_gradient="forward", seed=11)
    text = LoCAConfig(n_components=7, scale=-4.0, targets=("out",), location_gradient="backward", seed=12)
    inject(pipe.unet, unet, "a")
    inject(pipe.text_encoder, text, "a")
    file = pipe.save_loca_weights(tmp_path)
    other = stable_diffusion()
    other.load_loca_weights(file, "a")
    assert other.save_loca_weights(tmp_path / "again").read_bytes() == file.read_bytes()
    for component in ("unet", "text_encoder"):
        mine, theirs = adapters(getattr(pipe, component), "a"), adapters(getattr(other, component), "a")
        assert list(mine) == list(theirs)
        for projection, spectrum in mine.items():
            assert torch.equal(spectrum.cells, theirs[projection].cells)
            assert (spectrum.scale, spectrum.difference) == (theirs[projection].scale, theirs[projection].difference)


def test_a_saved_adapter_does_not_depend_on_what_acts(pipe: Any, first: Made, second: Made, tmp_path: Path) -> None:
    pipe.load_loca_weights(first.state(), "first")
    wanted = pipe.save_loca_weights(tmp_path / "0").read_bytes()
    pipe.set_loca_adapters("first", 0.1)
    assert pipe.save_loca_weights(tmp_path / "1").read_bytes() == wanted
    pipe.disable_loca()
    assert pipe.save_loca_weights(tmp_path / "2").read_bytes() == wanted
    pipe.enable_loca()
    pipe.fuse_loca()
    assert pipe.save_loca_weights(tmp_path / "3").read_bytes() == wanted
    pipe.unfuse_loca()
    pipe.load_loca_weights(second.state(), "second")
    assert pipe.save_loca_weights(tmp_path / "4", "first").read_bytes() == wanted
    assert pipe.save_loca_weights(tmp_path / "5").read_bytes() != wanted


@pytest.mark.parametrize(("names", "count"), [([], 0), (["first", "second"], 2)], ids=["none is active", "several are active"])
def test_the_one_to_save_must_be_clear(names: list[str], count: int, pipe: Any, first: Made, tmp_path: Path) -> None:
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(first.state(), "second")
    pipe.set_loca_adapters(names)
    with pytest.raises(ValueError, match=f"adapter_name=None: {count} adapters are active; name the one to save"):
        pipe.save_loca_weights(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []
    pipe.save_loca_weights(tmp_path, "second", weight_name="second.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["second.safetensors"]


@pytest.mark.parametrize("name", ["../a.safetensors", "/tmp/a.safetensors", "a/b.safetensors", "", "a.bin", "a\0.safetensors"])
def test_the_name_of_a_file_to_write_stays_in_its_folder(name: str, pipe: Any, first: Made, tmp_path: Path) -> None:
    pipe.load_loca_weights(first.state())
    with pytest.raises(ValueError, match="weight_name="):
        pipe.save_loca_weights(tmp_path / "folder", weight_name=name)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_saved_leaves_the_old_file(pipe: Any, first: Made, tmp_path: Path) -> None:
    pipe.load_loca_weights(first.state(), "first")
    old = pipe.save_loca_weights(tmp_path).read_bytes()
    with pytest.raises(ValueError, match="no adapter 'other' in the pipeline; it has 'first'"):
        pipe.save_loca_weights(tmp_path, "other")
    with pytest.raises(NotADirectoryError, match="expected a folder, got a file"):
        pipe.save_loca_weights(tmp_path / FILE_NAME)
    with torch.no_grad():
        next(iter(adapters(pipe.text_encoder, "first").values())).coefficients[0] = float("nan")
    with pytest.raises(ValueError, match=r"text_encoder\.text_model\.|text_encoder\.encoder\."):
        pipe.save_loca_weights(tmp_path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(FILE_NAME, old)]


def test_a_file_name_is_no_folder(pipe: Any, first: Made, tmp_path: Path) -> None:
    pipe.load_loca_weights(first.state())
    with pytest.raises(ValueError, match="weight_name is the name of the file in it"):
        pipe.save_loca_weights(tmp_path / "mine.safetensors")
    assert not list(tmp_path.iterdir())


def test_pipelines_and_models_are_told_apart(pipe: Any) -> None:
    with pytest.raises(TypeError, match=r"model is a StableDiffusionPipeline: .*such as pipe\.unet"):
        inject(pipe, LoCAConfig(n_components=4))
    with pytest.raises(TypeError, match="a UNet2DConditionModel is not a pipeline"):
        loca.get_loca_adapters(pipe.unet)


def hub_cache(folder: Path, repository: str, revision: str = "a" * 40) -> Path:
    """The folder of a repository's files in a cache of the hub."""
    top = folder / f"models--{repository.replace('/', '--')}"
    (top / "refs").mkdir(parents=True)
    (top / "refs" / "main").write_text(revision)
    return top / "snapshots" / revision


@pytest.mark.parametrize("parts", [UNET, TEXT, BOTH], ids=["unet", "text encoder", "both"])
def test_a_file_names_the_repository_of_the_base_and_no_path_of_this_machine(parts: dict[str, Any], tmp_path: Path) -> None:
    folder = hub_cache(tmp_path, "somebody/some-model")
    stable_diffusion().save_pretrained(folder)
    made = adapter(stable_diffusion(), parts)
    given: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True, "safety_checker": None}
    for source, wanted in ((folder, ""), ("somebody/some-model", "somebody/some-model")):
        pipe = quiet(StableDiffusionPipeline.from_pretrained(source, **given))
        pipe.load_loca_weights(made.state())
        file = pipe.save_loca_weights(tmp_path / "adapter")
        assert str(tmp_path).encode() not in file.read_bytes()
        with safetensors.safe_open(file, "pt") as opened:
            assert wanted in json.loads(opened.metadata()[METADATA_KEY])["base_model"]
