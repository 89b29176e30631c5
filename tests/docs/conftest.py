"""The environment in which the documentation's blocks run: tiny models, a few images, adapters, checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest
import timm
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import loca_vision.diffusers
from loca_vision import KINDS, LoCAConfig, inject, save_adapter
from loca_vision.formats.lora_files.low_rank_pair import LowRankPair
from loca_vision.formats.lora_files.writer import write_diffusers_lora
from support import pipelines as tiny
from support.image_folders import write_oxford_pets
from support.image_training import captioned, photographs

SMALL = {"embed_dim": 96, "depth": 1, "num_heads": 3}
CREATE = timm.create_model


@pytest.fixture(scope="session")
def saved_adapters(tmp_path_factory):
    """A folder with adapters of the tiny models under the names that pages load."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    for name in ("pets", "user/pets"):
        model = CREATE("vit_base_patch16_224.augreg_in21k", num_classes=37, **SMALL)
        inject(model, LoCAConfig(n_components=50))
        save_adapter(model, folder / name)
    for name in ("user/cartoon-loca", "ink"):
        pipe = tiny.instruct_pix2pix()
        inject(pipe.unet, LoCAConfig(n_components=5))
        loca_vision.diffusers.save_loca_weights(pipe, folder / name)
    pipe = tiny.stable_diffusion()
    inject(pipe.unet, LoCAConfig(n_components=5))
    loca_vision.diffusers.save_loca_weights(pipe, folder / "dog-loca")
    return folder


@pytest.fixture
def page_folder(saved_adapters, tmp_path, monkeypatch):
    """The working folder of a page, in which models are tiny and nothing is fetched."""
    shutil.copytree(saved_adapters, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **kwargs: CREATE(name, **SMALL, **kwargs))
    monkeypatch.setattr(StableDiffusionInstructPix2PixPipeline, "from_pretrained", lambda name: tiny.instruct_pix2pix())
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda name: tiny.quiet(tiny.stable_diffusion()))
    return tmp_path


@pytest.fixture
def page_names():
    """What a page may take as given: images, labels, loaders, a photograph."""
    images = torch.randn(2, 3, 224, 224)
    batches = [(images, torch.tensor([3, 5]))] * 2
    photo = Image.fromarray(np.full((16, 16, 3), 100, np.uint8))
    return {"loader": batches, "validation_loader": batches[:1], "images": images, "photo": photo}


@pytest.fixture
def command_folder(tmp_path, monkeypatch):
    """The working folder of the shell lines: photographs, image sets, checkpoints, a pipeline; pictures take two steps."""
    monkeypatch.chdir(tmp_path)
    draw = StableDiffusionPipeline.__call__
    short = {"num_inference_steps": 2}
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", lambda pipe, *given, **asked: draw(pipe, *given, **asked | short))
    for part in ("train", "test"):
        for name, value in (("cat", 40), ("dog", 200)):
            for i in range(3):
                folder = tmp_path / "photos" / part / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((40, 60, 3), value + i, np.uint8)).save(folder / f"{i}.png")
    _write_fashion(tmp_path / "data" / "FashionMNIST" / "raw")
    write_oxford_pets(tmp_path / "data")
    _write_checkpoints()
    tiny.instruct_pix2pix().save_pretrained("edit-base")
    tiny.small(tiny.stable_diffusion()).save_pretrained("image-base")
    photographs(tmp_path / "dog")
    captioned(tmp_path / "paintings")
    return tmp_path


def _write_checkpoints():
    """A LoRA of a pipeline, its UNet's weights, and others, into the working folder."""
    pipe = tiny.stable_diffusion()
    pipe.unet.save_pretrained("unet-base")
    write_diffusers_lora("cartoon-lora", _attention_lora(pipe, "unet"))
    with torch.no_grad():
        for name, parameter in pipe.unet.named_parameters():
            if name.endswith("to_v.weight"):
                parameter.add_(0.1)
    pipe.unet.save_pretrained("unet-tuned")
    for name in ("base", "trained"):
        save_file({"blocks.0.attn.qkv.weight": torch.randn(48, 16)}, f"{name}.safetensors")


def _attention_lora(pipe, component):
    layers = {f"{component}.{p}": m for p, m in getattr(pipe, component).named_modules() if p.endswith(("to_q", "to_v"))}
    return {p: LowRankPair(torch.randn(2, m.in_features), torch.randn(m.out_features, 2)) for p, m in layers.items()}


def _write_fashion(raw):
    """Four images in the published layout."""
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        pixels = torch.randint(256, (4, 28, 28), dtype=torch.uint8).numpy().tobytes()
        sizes = b"".join(n.to_bytes(4, "big") for n in (4, 28, 28))
        (raw / f"{part}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + pixels)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + (4).to_bytes(4, "big") + bytes([0, 9, 3, 9]))


@pytest.fixture(autouse=True)
def _methods_of_examples_are_forgotten() -> Iterator[None]:
    """An example that defines a method runs in this process."""
    known = dict(KINDS)
    yield
    KINDS.clear()
    KINDS.update(known)
