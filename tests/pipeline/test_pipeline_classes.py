"""The pipeline files: importable, loadable as custom pipelines, and stock pipelines once saved."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

import loca_vision.diffusers
from loca_vision import LoCAConfig, adapters, inject
from loca_vision.pipeline.loader import METHODS, PROPERTIES
from support import pipelines as tiny

ROOT = Path(__file__).parents[2]
KINDS = {
    "loca_stable_diffusion": ("LoCAStableDiffusionPipeline", StableDiffusionPipeline, tiny.stable_diffusion),
    "loca_stable_diffusion_xl": ("LoCAStableDiffusionXLPipeline", StableDiffusionXLPipeline, tiny.stable_diffusion_xl),
    "loca_instruct_pix2pix": (
        "LoCAInstructPix2PixPipeline",
        StableDiffusionInstructPix2PixPipeline,
        tiny.instruct_pix2pix,
    ),
}


@pytest.fixture(autouse=True)
def nothing_patched(monkeypatch, tmp_path):
    """The classes bring the methods themselves; diffusers copies custom pipelines to a folder of the test's."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    loca_vision.diffusers.unregister()
    yield
    loca_vision.diffusers.register()
    for name in [name for name in sys.modules if name.startswith(("diffusers_modules", "pipelines"))]:
        del sys.modules[name]


@pytest.fixture(params=KINDS)
def kind(request):
    name, stock, make = KINDS[request.param]
    return (
        ROOT / "pipelines" / f"{request.param}.py",
        getattr(importlib.import_module(f"pipelines.{request.param}"), name),
        stock,
        make,
    )


def adapted_folder(pipe, folder):
    inject(pipe.unet, LoCAConfig(n_components=10))
    with torch.no_grad():
        for spectrum in adapters(pipe.unet).values():
            spectrum.coefficients.normal_()
    loca_vision.diffusers.save_loca_weights(pipe, folder)
    return tiny.picture(pipe)


def test_it_is_the_stock_pipeline_with_the_methods(kind, tmp_path):
    _, cls, stock, make = kind
    base, shown = tiny.picture(make()), adapted_folder(make(), tmp_path)
    pipe = make(cls)
    assert isinstance(pipe, stock) and not hasattr(make(), "load_loca_weights")
    assert all(hasattr(pipe, name) for name in (*METHODS, *PROPERTIES))
    assert torch.equal(tiny.picture(pipe), base)
    pipe.load_loca_weights(tmp_path)
    assert torch.equal(tiny.picture(pipe), shown) and not torch.equal(shown, base)
    pipe.unload_loca_weights()
    assert torch.equal(tiny.picture(pipe), base)


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_saved_it_is_a_stock_pipeline(kind, tmp_path):
    file, cls, stock, make = kind
    make(cls).save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["_class_name"] == stock.__name__
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "saved")) is stock
    assert type(cls.from_pretrained(tmp_path / "saved")) is cls
    custom = {"custom_pipeline": str(file), "trust_remote_code": True}
    again = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path / "saved", **custom))
    assert type(again).__qualname__ == cls.__qualname__ and isinstance(again, stock)
    # read from the same file: the last bits depend on how weights lie in memory
    loaded = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path / "saved"))
    assert torch.equal(tiny.picture(again), tiny.picture(loaded))
    shown = adapted_folder(loaded, tmp_path / "adapter")
    again.load_loca_weights(tmp_path / "adapter")
    assert torch.equal(tiny.picture(again), shown)
    again.save_pretrained(tmp_path / "twice")
    assert type(DiffusionPipeline.from_pretrained(tmp_path / "twice")) is stock


def test_from_pipe_to_and_fro(kind):
    file, cls, stock, make = kind
    plain = make()
    custom = DiffusionPipeline.from_pipe(plain, custom_pipeline=str(file), trust_remote_code=True)
    assert type(custom).__qualname__ == cls.__qualname__ and custom.unet is plain.unet
    assert type(stock.from_pipe(custom)) is stock
    assert type(cls.from_pipe(plain)) is cls


def test_auto_pipelines_know_it(kind):
    _, cls, stock, make = kind
    if stock is not StableDiffusionInstructPix2PixPipeline:  # for which AutoPipeline has no task
        assert type(AutoPipelineForText2Image.from_pipe(make(cls))) is stock
        assert issubclass(AutoPipelineForImage2Image.from_pipe(make(cls)).__class__, DiffusionPipeline)
    if stock is StableDiffusionPipeline:
        assert type(AutoPipelineForImage2Image.from_pipe(make(cls))) is StableDiffusionImg2ImgPipeline
