"""LoCA methods of a pipeline: names, signatures and registration."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)

import loca_vision.diffusers as loca
from loca_vision.pipeline import loader
from loca_vision.pipeline.loader import LoCALoaderMixin
from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    FILE_NAME,
    Made,
    assert_near,
    assert_same,
    expected,
    facts,
)

METHODS = {
    "load_loca_weights": "source, adapter_name=None, *, weight_name=None, subfolder=None, revision=None, token=None, "
    "cache_dir=None, local_files_only=None, force_download=False, hotswap=False",
    "save_loca_weights": "directory, adapter_name=None, *, weight_name=None, dtype=torch.float32",
    "unload_loca_weights": "",
    "delete_loca_adapters": "names",
    "set_loca_adapters": "names, weights=None",
    "get_active_loca_adapters": "",
    "get_loca_adapters": "",
    "disable_loca": "",
    "enable_loca": "",
    "set_loca_device": "names, device",
    "fuse_loca": "components=None, *, scale=1.0, safe_fusing=False, adapter_names=None",
    "unfuse_loca": "components=None",
    "enable_loca_hotswap": "max_components",
}


PROPERTIES = ("num_fused_locas", "fused_locas")


def parameters(function: Callable[..., Any]) -> str:
    """The parameters after the first, without their types."""
    found = list(inspect.signature(function).parameters.values())[1:]
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found]
    return str(inspect.Signature(plain))[1:-1]


@pytest.mark.parametrize("name", METHODS)
def test_methods_and_functions_have_their_signatures(name: str) -> None:
    assert parameters(getattr(DiffusionPipeline, name)) == METHODS[name]
    assert parameters(getattr(loca, name)) == METHODS[name]
    assert getattr(loca, name).__doc__ and name in loca.__all__


def test_all_pipelines_have_them() -> None:
    for name in (*METHODS, *PROPERTIES):
        for cls in (StableDiffusionPipeline, StableDiffusionImg2ImgPipeline):
            assert getattr(cls, name) is vars(LoCALoaderMixin)[name]


_IMPORT = """
import logging, sys
import diffusers
from diffusers import DiffusionPipeline, StableDiffusionPipeline
def names(): return {cls: dict(vars(cls)) for cls in StableDiffusionPipeline.__mro__ if cls is not object}
before = names()
import loca_vision.diffusers
after = names()
for cls, members in before.items():
    assert all(after[cls][name] is member for name, member in members.items()), cls
    added = set(after[cls]) - set(members)
    assert cls is DiffusionPipeline or not added, (cls, added)
    if cls is DiffusionPipeline:
        print(*sorted(added))
"""


def test_importing_adds_methods_and_overrides_none_of_diffusers() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    added = done.stdout.split()
    assert set(added) >= {*METHODS, *PROPERTIES}
    assert all("loca" in name for name in added)


@pytest.fixture
def unregistered() -> Iterator[None]:
    loca.unregister()
    yield
    loca.register()


def test_unregister_takes_every_name_away_and_register_brings_it_back() -> None:
    there = dict(vars(DiffusionPipeline))
    for _ in range(2):
        loca.register()
        assert dict(vars(DiffusionPipeline)) == there
    try:
        for _ in range(2):
            loca.unregister()
            gone = set(there) - set(vars(DiffusionPipeline)) - {"__init_subclass__"}  # which comes with the first adapter
            assert gone == set(loader.METHODS) | set(loader.PROPERTIES) >= {*METHODS, *PROPERTIES}
            assert not any(hasattr(StableDiffusionPipeline, name) for name in gone)
            assert not any("loca" in name for name in dir(StableDiffusionPipeline) if "local" not in name)
    finally:
        loca.register()
    assert dict(vars(DiffusionPipeline)) == there


def test_unregister_leaves_what_others_have_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(self: Any) -> str:
        return "mine"

    monkeypatch.setattr(DiffusionPipeline, "fuse_loca", mine)
    try:
        loca.unregister()
        assert DiffusionPipeline.fuse_loca is mine
    finally:
        loca.register()


def test_functions_do_all_of_it_without_methods(unregistered: None, first: Made, tmp_path: Path) -> None:
    pipe = stable_diffusion()
    base = picture(pipe)
    loca.enable_loca_hotswap(pipe, 20)
    loca.load_loca_weights(pipe, first.state(), "one")
    assert loca.get_loca_adapters(pipe) == {"unet": ["one"], "text_encoder": ["one"]}
    assert loca.get_active_loca_adapters(pipe) == ["one"]
    assert_near(picture(pipe), expected((first, 1.0)))
    loca.set_loca_adapters(pipe, "one", 0.5)
    assert_near(picture(pipe), expected((first, 0.5)))
    loca.set_loca_device(pipe, "one", "cpu")
    loca.disable_loca(pipe)
    assert torch.equal(picture(pipe), base)
    loca.enable_loca(pipe)
    loca.fuse_loca(pipe)
    assert LoCALoaderMixin.num_fused_locas.__get__(pipe) == 1
    assert LoCALoaderMixin.fused_locas.__get__(pipe) == {"one"}
    loca.unfuse_loca(pipe)
    assert loca.save_loca_weights(pipe, tmp_path) == tmp_path / FILE_NAME
    loca.delete_loca_adapters(pipe, "one")
    loca.load_loca_weights(pipe, tmp_path)
    loca.unload_loca_weights(pipe)
    assert loca.get_loca_adapters(pipe) == {}
    assert torch.equal(picture(pipe), base)


def test_a_pipeline_class_may_take_the_mixin_itself(unregistered: None, first: Made) -> None:
    class Mine(LoCALoaderMixin, StableDiffusionPipeline):
        pass

    pipe = stable_diffusion(Mine)
    pipe.load_loca_weights(first.state())
    pipe.fuse_loca()
    assert (pipe.num_fused_locas, pipe.fused_locas) == (1, {"default_0"})
    assert_near(picture(pipe), expected((first, 1.0)))
    pipe.unload_loca_weights()
    assert type(pipe) is Mine


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_keyword_is_an_error(name: str, bare: Any, first: Made) -> None:
    required = [p for p in METHODS[name].split(", ") if p and p != "*" and "=" not in p]
    given: dict[str, Any] = {"source": first.state(), "directory": "x", "names": [], "device": "cpu", "max_components": 5}
    with pytest.raises(TypeError, match="adaptor_name"):
        getattr(bare, name)(*(given[p] for p in required), adaptor_name="a")
    assert bare.get_loca_adapters() == {}


def test_a_pipeline_without_adapters_says_so(pipe: Any) -> None:
    before = facts(pipe)
    assert (pipe.get_loca_adapters(), pipe.get_active_loca_adapters()) == ({}, [])
    assert (pipe.num_fused_locas, pipe.fused_locas) == (0, set())
    for nothing_to_do in (pipe.unload_loca_weights, pipe.enable_loca, pipe.disable_loca, pipe.unfuse_loca):
        nothing_to_do()
    pipe.set_loca_adapters([])
    with pytest.raises(ValueError, match="no adapter 'a' in the pipeline; it has none"):
        pipe.set_loca_adapters("a")
    with pytest.raises(ValueError, match="load one first"):
        pipe.fuse_loca()
    assert_same(pipe, before)
