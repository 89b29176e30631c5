"""LoCA's methods on a pipeline: what they are called, what they do to the picture, and that nothing else is changed."""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from oracle import (
    FILE_NAME,
    METADATA_KEY,
    Made,
    adapter,
    assert_far,
    assert_near,
    assert_same,
    expected,
    facts,
    layers,
    listed,
    merged,
    models,
)
from peft import LoraConfig
from tiny import instruct_pix2pix, picture, quiet, stable_diffusion, stable_diffusion_xl
from torch import Tensor, nn

import loca_vision.diffusers as loca
from loca_vision import LoCAConfig, active_adapters, adapters, inject, remove
from loca_vision.pipeline import load as loading
from loca_vision.pipeline import loader
from loca_vision.pipeline.loader import LoCALoaderMixin

METHODS = {
    "load_loca_weights": "source, adapter_name=None, *, weight_name=None, subfolder=None, revision=None, token=None, "
    "cache_dir=None, local_files_only=None, force_download=False, hotswap=False",
    "save_loca_weights": "directory, adapter_name=None, *, weight_name=None",
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
BOTH = {"unet": ("q", "v"), "text_encoder": ("q", "k", "v", "out")}
UNET = {"unet": ("q", "v")}
TEXT = {"text_encoder": ("q", "v")}


@pytest.fixture
def pipe() -> Any:
    return stable_diffusion()


@pytest.fixture(scope="module")
def base() -> Tensor:
    return picture(stable_diffusion())


@pytest.fixture(scope="module")
def first() -> Made:
    return adapter(stable_diffusion(), BOTH, seed=1, name="first")


@pytest.fixture(scope="module")
def second() -> Made:
    return adapter(stable_diffusion(), {"unet": ("k", "v", "out"), "text_encoder": ("q",)}, seed=2, scale=0.7, n=20)


# The surface


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
            gone = set(there) - set(vars(DiffusionPipeline))
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


@pytest.fixture(scope="module")
def bare() -> Any:
    """A pipeline that no test here may change, since nothing is asked of it that can be done."""
    return stable_diffusion()


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


# Loading


@pytest.mark.parametrize("make", [stable_diffusion, instruct_pix2pix, stable_diffusion_xl])
def test_the_picture_is_that_of_the_updated_weights(make: Callable[[], Any]) -> None:
    pipe = make()
    before = facts(pipe)
    every = {component: ("q", "k", "v", "out") for component in models(pipe) if component != "vae"}
    made = adapter(make(), every, seed=3)
    pipe.load_loca_weights(made.state())
    assert pipe.get_loca_adapters() == listed(every, "default_0")
    assert_far(picture(pipe), before["picture"])
    assert_near(picture(pipe), expected((made, 1.0), make=make))
    pipe.unload_loca_weights()
    assert_same(pipe, before)


@pytest.mark.parametrize("parts", [UNET, TEXT, BOTH], ids=["unet", "text encoder", "both"])
def test_any_of_the_components_may_be_adapted(parts: dict[str, Any], pipe: Any, base: Tensor) -> None:
    made = adapter(stable_diffusion(), parts, seed=4)
    pipe.load_loca_weights(made.state())
    assert pipe.get_loca_adapters() == listed(parts, "default_0")
    assert_far(picture(pipe), base)
    assert_near(picture(pipe), expected((made, 1.0)))


def test_one_of_two_text_encoders() -> None:
    pipe = stable_diffusion_xl()
    made = adapter(stable_diffusion_xl(), {"text_encoder_2": ("q", "v")}, size=4.0)
    pipe.load_loca_weights(made.state())
    assert pipe.get_loca_adapters() == {"text_encoder_2": ["default_0"]}
    assert_far(picture(pipe), picture(stable_diffusion_xl()))
    assert_near(picture(pipe), expected((made, 1.0), make=stable_diffusion_xl))


def test_counts_may_differ_from_projection_to_projection(pipe: Any, tmp_path: Path) -> None:
    made = adapter(stable_diffusion(), BOTH, n=lambda name: 3 + sum(map(ord, name)) % 17)
    assert len(set(made.about["config"]["unet"]["n_components"].values())) > 3
    pipe.load_loca_weights(made.state())
    assert_near(picture(pipe), expected((made, 1.0)))
    file = pipe.save_loca_weights(tmp_path)
    with safetensors.safe_open(file, "pt") as opened:
        saved = json.loads(opened.metadata()[METADATA_KEY])
    assert saved["config"] == made.about["config"]


def test_names_by_default(pipe: Any, first: Made, second: Made) -> None:
    for number, made in enumerate((first, second, first)):
        pipe.load_loca_weights(made.state())
        assert pipe.get_active_loca_adapters() == [f"default_{number}"]
    assert pipe.get_loca_adapters() == listed(BOTH, "default_0", "default_1", "default_2")
    pipe.delete_loca_adapters("default_0")
    pipe.load_loca_weights(second.state())
    assert set(pipe.get_loca_adapters()["unet"]) == {"default_0", "default_1", "default_2"}
    assert_near(picture(pipe), expected((second, 1.0)))


def test_the_new_adapter_is_the_only_active_one_in_all_components(pipe: Any, first: Made) -> None:
    narrow = adapter(stable_diffusion(), UNET, seed=5)
    pipe.load_loca_weights(first.state(), "wide")
    pipe.set_loca_adapters("wide", 0.3)
    pipe.disable_loca()
    pipe.load_loca_weights(narrow.state(), "narrow")
    assert pipe.get_active_loca_adapters() == ["narrow"]
    assert pipe.get_loca_adapters() == {"unet": ["wide", "narrow"], "text_encoder": ["wide"]}
    assert_near(picture(pipe), expected((narrow, 1.0)))


@pytest.mark.parametrize("made_for", [UNET, TEXT, BOTH], ids=["unet", "text encoder", "both"])
def test_a_name_in_use_anywhere_is_refused(made_for: dict[str, Any], pipe: Any, first: Made) -> None:
    inject(pipe.unet, LoCAConfig(n_components=4), "taken")
    before = facts(pipe)
    with pytest.raises(ValueError, match="adapter_name='taken': the pipeline has an adapter of that name"):
        pipe.load_loca_weights(adapter(stable_diffusion(), made_for).state(), "taken")
    assert_same(pipe, before)


@pytest.mark.parametrize("name", ["", "a.b", "../x", "a b", "x" * 101, 7, "é"])
def test_an_unfit_name_is_refused(name: Any, bare: Any, first: Made) -> None:
    before = facts(bare)
    with pytest.raises(ValueError, match="an adapter's name is 1 to 100 letters"):
        bare.load_loca_weights(first.state(), name)
    assert_same(bare, before)


def test_what_is_loaded_does_not_learn_and_freezes_nothing(pipe: Any, first: Made) -> None:
    pipe.unet.conv_in.requires_grad_(False)
    before = {key: p.requires_grad for key, p in pipe.unet.named_parameters()}
    pipe.load_loca_weights(first.state())
    after = {key: p.requires_grad for key, p in pipe.unet.named_parameters()}
    assert {key: after[key] for key in before} == before
    new = set(after) - set(before)
    assert len(new) == 2 * len(adapters(pipe.unet, "default_0")) and not any(after[key] for key in new)


def test_an_adapter_put_in_with_inject_is_one_of_the_pipelines(pipe: Any, base: Tensor, tmp_path: Path) -> None:
    inject(pipe.unet, LoCAConfig(n_components=9, scale=3.0, targets=("q", "out")), "mine")
    with torch.no_grad():
        for spectrum in adapters(pipe.unet, "mine").values():
            spectrum.coefficients.normal_()
    assert pipe.get_loca_adapters() == {"unet": ["mine"]} and pipe.get_active_loca_adapters() == ["mine"]
    shown = picture(pipe)
    assert_far(shown, base)
    file = pipe.save_loca_weights(tmp_path, "mine")
    other = stable_diffusion()
    other.load_loca_weights(file)
    assert torch.equal(picture(other), shown)
    pipe.fuse_loca()
    assert pipe.fused_locas == {"mine"}
    pipe.unfuse_loca()
    pipe.disable_loca()
    assert torch.equal(picture(pipe), base)
    pipe.set_loca_adapters("mine")
    assert torch.equal(picture(pipe), shown)
    pipe.load_loca_weights(file)
    assert pipe.get_loca_adapters() == {"unet": ["mine", "default_0"]}
    pipe.delete_loca_adapters("mine")
    assert torch.equal(picture(pipe), shown)
    pipe.unload_loca_weights()
    assert torch.equal(picture(pipe), base)


def test_loading_beside_an_injected_adapter_keeps_its_learning(pipe: Any, first: Made) -> None:
    inject(pipe.unet, LoCAConfig(n_components=9), "mine")
    learning = {key for key, p in pipe.unet.named_parameters() if p.requires_grad}
    pipe.load_loca_weights(first.state(), "loaded")
    assert {key for key, p in pipe.unet.named_parameters() if p.requires_grad} == learning
    pipe.delete_loca_adapters("loaded")
    assert {key for key, p in pipe.unet.named_parameters() if p.requires_grad} == learning


def test_an_adapter_taken_out_by_remove_is_gone_from_the_pipeline(pipe: Any, first: Made) -> None:
    before = facts(pipe)
    pipe.load_loca_weights(first.state(), "one")
    remove(pipe.unet, "one")
    assert pipe.get_loca_adapters() == {"text_encoder": ["one"]}
    pipe.unload_loca_weights()
    assert_same(pipe, before)


def test_what_was_loaded_in_inference_mode_works_outside_of_it(pipe: Any, first: Made) -> None:
    with torch.inference_mode():
        pipe.load_loca_weights(first.state())
        assert_near(picture(pipe), expected((first, 1.0)))
    assert_near(picture(pipe), expected((first, 1.0)))
    pipe.unet.train()
    out = pipe.unet(torch.randn(1, 4, 8, 8, requires_grad=True), 3, torch.randn(1, 6, 24)).sample
    out.sum().backward()
    pipe.unload_loca_weights()


def test_the_base_can_be_loaded_beneath_adapters(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state())
    pipe.fuse_loca()
    pipe.unfuse_loca()
    for component, model in models(stable_diffusion()).items():
        getattr(pipe, component).load_state_dict(model.state_dict())
    assert_near(picture(pipe), expected((first, 1.0)))


# A failure half-way


def failing(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """Like the function, but the call of that number is an error."""
    calls = 0

    def fails(*args: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            raise RuntimeError("no memory left")
        return function(*args, **named)

    return fails


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "with another adapter"])
@pytest.mark.parametrize(
    ("what", "at"),
    [
        ("loca_vision.pipeline.load.attach", 2),
        ("loca_vision.pipeline.load.prepared", 2),
        ("loca_vision.pipeline.load.activate", 2),
        ("loca_vision.model.inject.updates_of", 3),
        ("loca_vision.model.inject.updates_of", 12),
        ("loca_vision.model.inject.activate", 2),
    ],
)
def test_a_load_that_fails_half_way_changes_nothing(
    what: str, at: int, adapted: bool, pipe: Any, first: Made, second: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    if adapted:
        pipe.load_loca_weights(second.state(), "second")
        pipe.load_loca_weights(second.state(), "third")
        pipe.set_loca_adapters(["third", "second"], [0.5, 0.25])
        pipe.disable_loca()
    before = facts(pipe)
    module, _, name = what.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[module], name, failing(getattr(sys.modules[module], name), at))
        with pytest.raises(RuntimeError, match="no memory left"):
            pipe.load_loca_weights(first.state(), "first")
    assert_same(pipe, before)
    if adapted:
        pipe.enable_loca()
        assert_near(picture(pipe), expected((second, 0.75)))
    pipe.load_loca_weights(first.state(), "first")
    assert_near(picture(pipe), expected((first, 1.0)))


def test_a_load_that_fails_half_way_keeps_whole_tensors(pipe: Any, first: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = adapter(stable_diffusion(), BOTH, seed=6, whole=["unet.conv_in.weight"])
    pipe.load_loca_weights(whole.state(), "whole")
    before = facts(pipe)
    other = adapter(stable_diffusion(), BOTH, seed=7, whole=["unet.conv_in.weight", "unet.conv_in.bias"])
    with monkeypatch.context() as patch:
        patch.setattr(loading, "activate", failing(loading.activate, 2))
        with pytest.raises(RuntimeError, match="no memory left"):
            pipe.load_loca_weights(other.state(), "other")
    assert_same(pipe, before)
    pipe.unload_loca_weights()
    assert torch.equal(pipe.unet.conv_in.bias, stable_diffusion().unet.conv_in.bias)


# Saving


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
    with pytest.raises(NotADirectoryError, match="it is a file, and a folder is wanted"):
        pipe.save_loca_weights(tmp_path / FILE_NAME)
    with torch.no_grad():
        next(iter(adapters(pipe.text_encoder, "first").values())).coefficients[0] = float("nan")
    with pytest.raises(ValueError, match=r"text_encoder\.text_model\.|text_encoder\.encoder\."):
        pipe.save_loca_weights(tmp_path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(FILE_NAME, old)]


def test_a_file_name_is_no_folder(pipe: Any, first: Made, tmp_path: Path) -> None:
    pipe.load_loca_weights(first.state())
    with pytest.raises(ValueError, match="the name of the file in it is weight_name"):
        pipe.save_loca_weights(tmp_path / "mine.safetensors")
    assert not list(tmp_path.iterdir())


def test_pipelines_and_models_are_told_apart(pipe: Any) -> None:
    with pytest.raises(TypeError, match=r"model is a StableDiffusionPipeline: .*such as pipe\.unet"):
        inject(pipe, LoCAConfig(n_components=4))
    with pytest.raises(TypeError, match="a UNet2DConditionModel is no pipeline"):
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


# Which act


def test_several_adapters_add_up(pipe: Any, base: Tensor, first: Made, second: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(second.state(), "second")
    for names, weights, terms in (
        (["first", "second"], None, [(first, 1.0), (second, 1.0)]),
        (["second", "first"], [0.5, -0.25], [(first, -0.25), (second, 0.5)]),
        (("first", "second"), 0.3, [(first, 0.3), (second, 0.3)]),
        (["first", "second"], [None, 2], [(first, 1.0), (second, 2.0)]),
        ("second", 0.0, []),
        ("second", None, [(second, 1.0)]),
        ([], None, []),
        ("first", [0.7], [(first, 0.7)]),
    ):
        pipe.set_loca_adapters(names, weights)
        assert pipe.get_active_loca_adapters() == ([names] if isinstance(names, str) else list(names))
        assert_near(picture(pipe), expected(*terms))
    pipe.set_loca_adapters([])
    assert torch.equal(picture(pipe), base)


def test_adapters_of_different_components_act_together(pipe: Any) -> None:
    one, other = adapter(stable_diffusion(), UNET, seed=8), adapter(stable_diffusion(), TEXT, seed=9)
    pipe.load_loca_weights(one.state(), "one")
    pipe.load_loca_weights(other.state(), "other")
    assert_near(picture(pipe), expected((other, 1.0)))
    pipe.set_loca_adapters(["one", "other"], [0.5, 2.0])
    assert sorted(pipe.get_active_loca_adapters()) == ["one", "other"]
    assert_near(picture(pipe), expected((one, 0.5), (other, 2.0)))


def test_disabled_adapters_rest_and_keep_their_weights(pipe: Any, base: Tensor, first: Made, second: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(second.state(), "second")
    pipe.set_loca_adapters(["first", "second"], [0.5, 0.25])
    shown = picture(pipe)
    for _ in range(2):
        pipe.disable_loca()
        assert torch.equal(picture(pipe), base)
        assert pipe.get_active_loca_adapters() == ["first", "second"]
    for _ in range(2):
        pipe.enable_loca()
        assert torch.equal(picture(pipe), shown)
    pipe.disable_loca()
    pipe.set_loca_adapters("first")
    assert_near(picture(pipe), expected((first, 1.0)))
    pipe.disable_loca()
    pipe.load_loca_weights(second.state(), "third")
    assert_near(picture(pipe), expected((second, 1.0)))


def test_deleting_takes_out_only_what_is_named(pipe: Any, base: Tensor, first: Made, second: Made) -> None:
    before = facts(pipe)
    for name, made in (("first", first), ("second", second), ("third", first)):
        pipe.load_loca_weights(made.state(), name)
    pipe.set_loca_adapters(["first", "second", "third"])
    pipe.delete_loca_adapters("first")
    assert pipe.get_loca_adapters() == listed(BOTH, "second", "third")
    assert pipe.get_active_loca_adapters() == ["second", "third"]
    assert_near(picture(pipe), expected((first, 1.0), (second, 1.0)))
    pipe.set_loca_adapters("third")
    pipe.delete_loca_adapters("third")
    assert pipe.get_active_loca_adapters() == []
    assert torch.equal(picture(pipe), base)
    pipe.set_loca_adapters("second")
    assert_near(picture(pipe), expected((second, 1.0)))
    pipe.delete_loca_adapters(["second"])
    assert_same(pipe, before)


def test_deleting_what_is_in_one_component(pipe: Any, first: Made) -> None:
    text = adapter(stable_diffusion(), TEXT, seed=9)
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(text.state(), "text")
    pipe.set_loca_adapters(["first", "text"])
    pipe.delete_loca_adapters(["text"])
    assert pipe.get_loca_adapters() == listed(BOTH, "first")
    assert_near(picture(pipe), expected((first, 1.0)))


@pytest.mark.parametrize("names", ["other", ["first", "other"], ["first", "first"], ["other", "another"], [7]])
def test_an_unknown_name_is_refused_and_changes_nothing(names: Any, pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    before = facts(pipe)
    words = (
        "an adapter is named twice" if names == ["first", "first"] else "no adapter (7|'other') in the pipeline; it has 'first'"
    )
    for call in (
        pipe.set_loca_adapters,
        pipe.delete_loca_adapters,
        lambda names: pipe.set_loca_device(names, "cpu"),
        lambda names: pipe.fuse_loca(adapter_names=names),
    ):
        with pytest.raises(ValueError, match=words):
            call(names)
    assert_same(pipe, before)


def test_moving_to_the_device_it_is_on_changes_nothing(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    before = facts(pipe)
    for names, device in (("first", "cpu"), (["first"], torch.device("cpu"))):
        pipe.set_loca_device(names, device)
    with pytest.raises(RuntimeError, match="nowhere"):
        pipe.set_loca_device("first", "nowhere")
    assert_same(pipe, before)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is such a device")
def test_a_device_that_is_not_there_is_refused(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    before = facts(pipe)
    with pytest.raises(RuntimeError, match=r"CUDA|NVIDIA"):
        pipe.set_loca_device("first", "cuda")
    assert_same(pipe, before)


def test_only_the_named_adapters_move(pipe: Any, first: Made, second: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(second.state(), "second")
    moved = []
    for model in (pipe.unet, pipe.text_encoder):
        for name in ("first", "second"):
            for projection, spectrum in adapters(model, name).items():
                monkeypatch.setattr(spectrum, "to", lambda device, what=(name, projection): moved.append((*what, str(device))))
    pipe.set_loca_device(["second"], "cpu")
    wanted = {projection for model in (pipe.unet, pipe.text_encoder) for projection in adapters(model, "second")}
    assert set(moved) == {("second", projection, "cpu") for projection in wanted}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_spectra_on_another_device_go_on_working(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    pipe.set_loca_device("first", "cuda")
    assert all(s.coefficients.is_cuda for s in adapters(pipe.unet, "first").values())
    assert_near(picture(pipe), expected((first, 1.0)))


# Taking everything out


def test_unloading_restores_every_bit(pipe: Any, first: Made, second: Made) -> None:
    before = facts(pipe)
    for made in (first, second):
        pipe.load_loca_weights(made.state())
    pipe.set_loca_adapters(["default_0", "default_1"], [0.3, {"unet": {"down": 2.0}}])
    picture(pipe)
    pipe.unload_loca_weights()
    assert_same(pipe, before)
    pipe.unload_loca_weights()
    pipe.load_loca_weights(first.state())
    assert pipe.get_active_loca_adapters() == ["default_0"]
    assert_near(picture(pipe), expected((first, 1.0)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_restored_too_and_spectra_stay_exact(dtype: torch.dtype, first: Made) -> None:
    pipe = stable_diffusion().to(dtype)
    before = facts(pipe)
    pipe.load_loca_weights(first.state())
    full = stable_diffusion()
    full.load_loca_weights(first.state())
    full.to(dtype)
    assert torch.equal(picture(full), picture(pipe))
    for model in (pipe.unet, full.unet):
        spectrum = next(iter(adapters(model, "default_0").values()))
        assert spectrum.coefficients.dtype == spectrum.locations.dtype == torch.float32
    made = merged((first, 1.0), make=lambda: stable_diffusion().to(dtype))
    assert_near(output_of_half(pipe, dtype), output_of_half(made, dtype), tolerance=0.05)
    pipe.unload_loca_weights()
    assert_same(pipe, before)


@torch.no_grad()
def output_of_half(pipe: Any, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    sample, text = (torch.randn(size, generator=generator).to(dtype) for size in ((2, 4, 8, 8), (2, 6, 24)))
    result: Tensor = pipe.unet(sample, torch.tensor(3), text, return_dict=False)[0]
    return result.float()


# The strength of one call


@pytest.mark.parametrize("parts", [UNET, TEXT, BOTH], ids=["unet", "text encoder", "both"])
def test_a_call_has_its_own_strength(parts: dict[str, Any], pipe: Any, base: Tensor) -> None:
    made = adapter(stable_diffusion(), parts, seed=4, size=0.5)
    pipe.load_loca_weights(made.state())
    shown = picture(pipe)
    assert_far(shown, base)
    for strength in (0.5, -1.0, 3):
        assert_near(picture(pipe, cross_attention_kwargs={"scale": strength}), expected((made, float(strength))))
        assert torch.equal(picture(pipe), shown)
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0}), base)
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 1.0}), shown)
    assert torch.equal(picture(pipe, cross_attention_kwargs={}), shown)
    assert torch.equal(picture(pipe, cross_attention_kwargs=None), shown)


def test_it_multiplies_the_weights_set_before(pipe: Any, base: Tensor, first: Made, second: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(second.state(), "second")
    pipe.set_loca_adapters(["first", "second"], [0.5, {"unet": 0.8, "text_encoder": 0.2}])
    shown = picture(pipe)

    def strength(name: str) -> float:
        return 0.8 if name.startswith("unet") else 0.2

    assert_near(shown, expected((first, 0.5), (second, strength)))
    half = picture(pipe, cross_attention_kwargs={"scale": 0.5})
    assert_near(half, expected((first, 0.25), (second, lambda name: strength(name) / 2)))
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    assert torch.equal(picture(pipe), shown)


def test_it_holds_for_adapters_put_in_with_inject(pipe: Any, base: Tensor) -> None:
    for model in (pipe.unet, pipe.text_encoder):
        inject(model, LoCAConfig(n_components=9, scale=3.0), "mine")
        with torch.no_grad():
            for spectrum in adapters(model, "mine").values():
                spectrum.coefficients.normal_()
    half = picture(pipe, cross_attention_kwargs={"scale": 0.5})
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    pipe.set_loca_adapters("mine", 0.5)
    assert_near(picture(pipe), half)


def test_a_call_that_fails_leaves_no_strength_behind(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state())
    shown = picture(pipe)

    def fails(*_: Any) -> Any:
        raise RuntimeError("stopped by the user")

    with pytest.raises(RuntimeError, match="stopped by the user"):
        picture(pipe, cross_attention_kwargs={"scale": 0.2}, callback_on_step_end=fails)
    ids = pipe.tokenizer("a cat", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        assert_near(pipe.text_encoder(ids)[0], merged((first, 1.0)).text_encoder(ids)[0])
    assert torch.equal(picture(pipe), shown)


def test_prompts_encoded_beforehand_have_a_strength_too(pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state())
    for strength in (None, 0.5, 0.0):
        with torch.no_grad():
            found = pipe.encode_prompt("a cat", "cpu", 1, False, lora_scale=strength)[0]
            wanted = merged((first, 1.0 if strength is None else strength))
            assert_near(found, wanted.encode_prompt("a cat", "cpu", 1, False)[0])


@pytest.mark.parametrize("scale", ["0.5", math.nan, math.inf, None, True, [0.5]], ids=str)
def test_a_strength_that_is_no_number_is_refused(scale: Any, pipe: Any, first: Made) -> None:
    pipe.load_loca_weights(first.state())
    before = facts(pipe)
    with pytest.raises(ValueError, match=r"scale=.*: the scale of a call is a finite number"):
        picture(pipe, cross_attention_kwargs={"scale": scale})
    assert_same(pipe, before)


@pytest.mark.parametrize("make", [instruct_pix2pix, stable_diffusion_xl])
def test_other_pipelines_take_it_too(make: Callable[[], Any]) -> None:
    pipe = make()
    made = adapter(make(), {component: ("q", "v") for component in models(pipe) if component != "vae"}, size=2.0)
    pipe.load_loca_weights(made.state())
    assert_near(picture(pipe, cross_attention_kwargs={"scale": 0.5}), expected((made, 0.5), make=make))
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), picture(make()))
    assert_near(picture(pipe), expected((made, 1.0), make=make))


def test_what_else_is_in_the_mapping_reaches_the_processors(pipe: Any, first: Made) -> None:
    from diffusers.models.attention_processor import AttnProcessor

    class Listening(AttnProcessor):
        heard: tuple[Any, ...] = ()

        def __call__(self, attn: Any, hidden_states: Any, *args: Any, word: str = "", **named: Any) -> Any:
            Listening.heard = (*Listening.heard, word)
            return super().__call__(attn, hidden_states, *args, **named)

    pipe.unet.set_attn_processor(Listening())
    pipe.load_loca_weights(first.state())
    given = {"scale": 0.5, "word": "hello"}
    assert_near(picture(pipe, cross_attention_kwargs=given), expected((first, 0.5)))
    assert set(Listening.heard) == {"hello"}
    assert given == {"scale": 0.5, "word": "hello"}


def test_nothing_is_said_about_what_works(
    pipe: Any, first: Made, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import diffusers
    import transformers

    names = [
        None,
        *(name for name in logging.Logger.manager.loggerDict if name.startswith(("diffusers", "transformers", "loca"))),
    ]
    loggers = [logging.getLogger(name) for name in names]
    before = [(logger, logger.level) for logger in loggers]
    diffusers.logging.enable_propagation()
    transformers.logging.enable_propagation()
    try:
        with caplog.at_level(logging.INFO):
            for logger in loggers:
                logger.setLevel(logging.INFO)
            capfd.readouterr()
            pipe.load_loca_weights(first.write(tmp_path))
            picture(pipe, cross_attention_kwargs={"scale": 0.5})
            picture(pipe)
            pipe.set_loca_adapters("default_0", {"unet": {"mid": 0.5}})
            pipe.save_loca_weights(tmp_path / "again")
            pipe.fuse_loca()
            pipe.unfuse_loca()
            pipe.unload_loca_weights()
            said = capfd.readouterr()
            hearing = {"diffusers.pipelines", "transformers.models", "loca_vision.pipeline.loader", "anyone"}
            for name in hearing:
                logging.getLogger(name).info("heard")
    finally:
        diffusers.logging.disable_propagation()
        transformers.logging.disable_propagation()
        for logger, level in before:
            logger.setLevel(level)
    assert {(record.name, record.getMessage()) for record in caplog.records} == {(name, "heard") for name in hearing}
    assert said == ("", "")


# Low memory


def test_less_memory_gives_the_same_picture(pipe: Any, base: Tensor, first: Made, second: Made) -> None:
    pipe.enable_loca_low_memory()
    pipe.load_loca_weights(first.state(), "first")
    pipe.load_loca_weights(second.state(), "second")
    pipe.set_loca_adapters(["first", "second"], [0.5, 0.25])
    assert_near(picture(pipe), expected((first, 0.5), (second, 0.25)))
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    assert_near(picture(pipe, cross_attention_kwargs={"scale": 2.0}), expected((first, 1.0), (second, 0.5)))
    pipe.enable_loca_low_memory(False)
    assert_near(picture(pipe), expected((first, 0.5), (second, 0.25)))


# Whole tensors

CONV_IN = ["unet.conv_in.weight", "unet.conv_in.bias"]


@pytest.mark.parametrize("make", [stable_diffusion, instruct_pix2pix])
def test_a_conv_in_trained_whole_comes_and_goes(make: Callable[[], Any], tmp_path: Path) -> None:
    pipe = make()
    before = facts(pipe)
    made = adapter(make(), UNET, whole=CONV_IN)
    plain = adapter(make(), UNET, seed=2)
    pipe.load_loca_weights(made.state(), "whole")
    assert_near(picture(pipe), expected((made, 1.0), make=make))
    assert torch.equal(pipe.unet.conv_in.weight, made.whole["unet.conv_in.weight"])
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path))
    assert torch.equal(tensors["full.unet.conv_in.weight"], made.whole["unet.conv_in.weight"])
    pipe.disable_loca()
    assert torch.equal(picture(pipe), before["picture"])
    pipe.enable_loca()
    assert torch.equal(pipe.unet.conv_in.bias, made.whole["unet.conv_in.bias"])
    pipe.set_loca_adapters([])
    assert torch.equal(picture(pipe), before["picture"])
    pipe.load_loca_weights(plain.state(), "plain")
    assert_near(picture(pipe), expected((plain, 1.0), make=make))
    pipe.set_loca_adapters(["whole", "plain"], [0.5, 1.0])
    assert_near(picture(pipe), expected((made, 0.5), (plain, 1.0), make=make))
    again = pipe.save_loca_weights(tmp_path / "again", "whole")
    assert torch.equal(safetensors.torch.load_file(again)["full.unet.conv_in.weight"], made.whole["unet.conv_in.weight"])
    pipe.unload_loca_weights()
    assert_same(pipe, before)


def test_a_conv_in_trained_here_is_saved_under_its_name(pipe: Any, tmp_path: Path) -> None:
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    inject(pipe.unet, LoCAConfig(n_components=5), "mine")
    pipe.unet.conv_in.requires_grad_(True)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)
    shown = picture(pipe)
    file = pipe.save_loca_weights(tmp_path)
    tensors = safetensors.torch.load_file(file)
    assert {key for key in tensors if key.startswith("full.")} == {"full.unet.conv_in.weight", "full.unet.conv_in.bias"}
    other = stable_diffusion()
    base = facts(other)
    other.load_loca_weights(file)
    assert torch.equal(picture(other), shown)
    other.unload_loca_weights()
    assert_same(other, base)
    assert all(torch.equal(other.unet.state_dict()[key], value) for key, value in before.items())


@pytest.mark.parametrize("fused", [False, True], ids=["beside the weights", "fused"])
def test_a_saved_pipeline_has_the_conv_in_that_goes_with_its_weights(fused: bool, pipe: Any, tmp_path: Path) -> None:
    base = picture(pipe)
    made = adapter(stable_diffusion(), UNET, whole=CONV_IN)
    pipe.load_loca_weights(made.state())
    pipe.fuse_loca() if fused else None
    pipe.save_pretrained(tmp_path)
    again = quiet(StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None))
    assert_near(picture(again), expected((made, 1.0)) if fused else base, 1e-5 if fused else 1e-12)
    assert_near(picture(pipe), expected((made, 1.0)))


def test_the_last_adapter_named_supplies_whole_tensors(pipe: Any) -> None:
    one = adapter(stable_diffusion(), UNET, seed=1, whole=CONV_IN)
    other = adapter(stable_diffusion(), UNET, seed=2, whole=CONV_IN)
    pipe.load_loca_weights(one.state(), "one")
    pipe.load_loca_weights(other.state(), "other")
    for names, terms in (
        (["one", "other"], ((one, 1.0), (other, 1.0))),
        (["other", "one"], ((other, 1.0), (one, 1.0))),
        (["one"], ((one, 1.0),)),
    ):
        pipe.set_loca_adapters(names)
        assert_near(picture(pipe), expected(*terms))


# Other pipelines of the same components


def picture_to_picture(pipe: Any, **more: Any) -> Tensor:
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    generator = torch.Generator().manual_seed(5)
    given = {"image": image, "num_inference_steps": 4, "strength": 0.5, "output_type": "pt", "generator": generator}
    return torch.as_tensor(pipe("a cat", **given | more).images)


def other_pipelines(pipe: Any) -> list[Any]:
    return [quiet(cls.from_pipe(pipe)) for cls in (StableDiffusionImg2ImgPipeline, AutoPipelineForImage2Image)]


def test_pipelines_that_share_components_share_adapters(pipe: Any, first: Made, second: Made) -> None:
    before = facts(pipe)
    pipe.load_loca_weights(first.state(), "first")
    base = picture_to_picture(quiet(StableDiffusionImg2ImgPipeline.from_pipe(stable_diffusion())))
    for other in other_pipelines(pipe):
        assert type(other).__name__ == "StableDiffusionImg2ImgPipeline"
        assert other.get_loca_adapters() == listed(BOTH, "first")
        wanted = quiet(StableDiffusionImg2ImgPipeline.from_pipe(merged((first, 1.0))))
        assert_far(picture_to_picture(other), base)
        assert_near(picture_to_picture(other), picture_to_picture(wanted))
    other.load_loca_weights(second.state(), "second")
    assert pipe.get_active_loca_adapters() == ["second"]
    assert_near(picture(pipe), expected((second, 1.0)))
    pipe.set_loca_adapters(["first"], 0.5)
    assert_near(picture_to_picture(other), picture_to_picture(from_merged(first, 0.5)))
    pipe.unload_loca_weights()
    assert other.get_loca_adapters() == {}
    assert torch.equal(picture_to_picture(other), base)
    assert_same(pipe, before)


def from_merged(made: Made, strength: float) -> Any:
    return quiet(StableDiffusionImg2ImgPipeline.from_pipe(merged((made, strength))))


def test_the_strength_of_a_call_holds_in_every_pipeline_of_the_components(pipe: Any, first: Made) -> None:
    early = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    pipe.load_loca_weights(first.state())
    late = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    for other in (late, early):
        assert_near(picture_to_picture(other), picture_to_picture(from_merged(first, 1.0)))
        half = picture_to_picture(other, cross_attention_kwargs={"scale": 0.5})
        assert_near(half, picture_to_picture(from_merged(first, 0.5)))
        assert_near(picture_to_picture(other), picture_to_picture(from_merged(first, 1.0)))


def test_unloading_from_another_pipeline_gives_this_one_its_class_back(pipe: Any, first: Made) -> None:
    before = facts(pipe)
    other = quiet(StableDiffusionImg2ImgPipeline.from_pipe(pipe))
    other.load_loca_weights(first.state())
    other.unload_loca_weights()
    assert type(other) is StableDiffusionImg2ImgPipeline
    assert_same(pipe, before)


# Saved pipelines


@pytest.mark.parametrize("fused", [False, True], ids=["beside the weights", "fused"])
def test_a_pipeline_saved_with_adapters_is_the_stock_one(
    fused: bool, pipe: Any, base: Tensor, first: Made, tmp_path: Path
) -> None:
    keys = {c: set(model.state_dict()) for c, model in models(pipe).items()}
    pipe.load_loca_weights(first.state())
    shown = picture(pipe)
    if fused:
        pipe.fuse_loca()
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert torch.equal(picture(pipe), shown) or fused
    for cls in (StableDiffusionPipeline, DiffusionPipeline, AutoPipelineForText2Image):
        again = quiet(cls.from_pretrained(tmp_path, safety_checker=None))
        assert type(again) is StableDiffusionPipeline
        assert {c: set(model.state_dict()) for c, model in models(again).items()} == keys
        assert again.get_loca_adapters() == {}
        if fused:
            assert_near(picture(again), shown)
        else:
            assert torch.equal(picture(again), base)
            again.load_loca_weights(first.state())
            assert torch.equal(picture(again), shown)


# Copies


def copied(pipe: Any) -> Any:
    return copy.deepcopy(pipe)


def pickled(pipe: Any) -> Any:
    return pickle.loads(pickle.dumps(pipe))


@pytest.mark.parametrize("copying", [copied, pickled])
def test_a_copy_has_adapters_of_its_own(copying: Callable[[Any], Any], pipe: Any, base: Tensor, first: Made) -> None:
    pipe.load_loca_weights(first.state(), "first")
    shown = picture(pipe)
    other = copying(pipe)
    assert torch.equal(picture(other), shown)
    assert_near(picture(other, cross_attention_kwargs={"scale": 0.5}), expected((first, 0.5)))
    other.set_loca_adapters("first", 0.5)
    assert torch.equal(picture(pipe), shown)
    assert_near(picture(other), expected((first, 0.5)))
    other.unload_loca_weights()
    assert torch.equal(picture(other), base) and torch.equal(picture(pipe), shown)
    assert (other.get_loca_adapters(), pipe.get_active_loca_adapters()) == ({}, ["first"])
    assert type(other) is StableDiffusionPipeline


# LoRA beside it


def add_lora(pipe: Any) -> None:
    for model, targets in ((pipe.unet, ["to_q", "to_v", "to_out.0"]), (pipe.text_encoder, ["q_proj", "v_proj"])):
        torch.manual_seed(21)
        model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False), "lora")


@torch.no_grad()
def lora_in_weights(strength: float = 1.0) -> Any:
    """A pipeline with the same LoRA written into its weights."""
    with_lora, pipe = stable_diffusion(), stable_diffusion()
    add_lora(with_lora)
    for component in ("unet", "text_encoder"):
        plain = getattr(pipe, component)
        for path, layer in getattr(with_lora, component).named_modules():
            if hasattr(layer, "lora_A"):
                update = layer.lora_B["lora"].weight @ layer.lora_A["lora"].weight
                plain.get_submodule(path).weight += strength * layer.scaling["lora"] * update
    return pipe


def both_in_weights(made: Made, loca_strength: float, lora_strength: float) -> Tensor:
    return expected((made, loca_strength), make=lambda: lora_in_weights(lora_strength))


@pytest.mark.parametrize("order", ["lora first", "loca first"])
@pytest.mark.parametrize("out", ["lora", "loca"])
def test_lora_and_loca_come_and_go_by_themselves(order: str, out: str, pipe: Any, base: Tensor, first: Made) -> None:
    keys = {c: set(model.state_dict()) for c, model in models(pipe).items()}
    if order == "lora first":
        add_lora(pipe)
    pipe.load_loca_weights(first.state(), "loca")
    if order == "loca first":
        add_lora(pipe)
    assert_near(picture(pipe), both_in_weights(first, 1.0, 1.0))
    pipe.set_adapters("lora", 0.5)
    pipe.set_loca_adapters("loca", 0.25)
    assert_near(picture(pipe), both_in_weights(first, 0.25, 0.5))
    assert pipe.get_list_adapters() == {"unet": ["lora"], "text_encoder": ["lora"]}
    assert pipe.get_loca_adapters() == listed(BOTH, "loca")
    if out == "lora":
        pipe.unload_lora_weights()
        assert_near(picture(pipe), expected((first, 0.25)))
        pipe.unload_loca_weights()
    else:
        pipe.unload_loca_weights()
        assert_near(picture(pipe), picture(lora_in_weights(0.5)))
        pipe.unload_lora_weights()
    assert torch.equal(picture(pipe), base)
    assert {c: set(model.state_dict()) for c, model in models(pipe).items()} == keys


def test_the_strength_of_a_call_is_for_both(pipe: Any, base: Tensor, first: Made) -> None:
    add_lora(pipe)
    pipe.load_loca_weights(first.state())
    assert_near(picture(pipe, cross_attention_kwargs={"scale": 0.5}), both_in_weights(first, 0.5, 0.5))
    assert_near(picture(pipe), both_in_weights(first, 1.0, 1.0))


def test_disabling_the_one_leaves_the_other(pipe: Any, first: Made) -> None:
    add_lora(pipe)
    pipe.load_loca_weights(first.state())
    pipe.disable_lora()
    assert_near(picture(pipe), expected((first, 1.0)))
    pipe.enable_lora()
    pipe.disable_loca()
    assert_near(picture(pipe), picture(lora_in_weights()))


def test_a_loca_file_holds_no_lora(pipe: Any, first: Made, tmp_path: Path) -> None:
    add_lora(pipe)
    pipe.load_loca_weights(first.state())
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path))
    assert set(tensors) == set(first.tensors)


# Compiled and offloaded components


def compiled(pipe: Any) -> Any:
    pipe.unet = torch.compile(pipe.unet, backend="aot_eager")
    return pipe


def offloaded(pipe: Any) -> Any:
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    return pipe


def shown(pipe: Any) -> Tensor:
    """The picture, without compiling anything: that takes seconds each time."""
    with torch.compiler.set_stance("force_eager"):
        return picture(pipe)


@pytest.mark.parametrize("wrap", [compiled, offloaded])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wrapped_unet_answers_as_a_plain_one_does(
    wrap: Callable[[Any], Any], when: str, first: Made, second: Made, base: Tensor, tmp_path: Path
) -> None:
    pipe = stable_diffusion()
    if when == "before":
        wrap(pipe)
    pipe.load_loca_weights(first.state(), "first")
    if when == "after":
        wrap(pipe)
    assert pipe.get_loca_adapters() == listed(BOTH, "first")
    assert pipe.get_active_loca_adapters() == ["first"]
    assert_near(shown(pipe), expected((first, 1.0)))
    pipe.load_loca_weights(second.state(), "second")
    pipe.set_loca_adapters(["first", "second"], [0.5, {"unet": {"down": 0.25}}])

    def strength(name: str) -> float:
        return 0.25 if name.startswith("unet.down_blocks.") else 1.0

    wanted = expected((first, 0.5), (second, strength))
    assert_near(shown(pipe), wanted)
    tensors = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path, "first"))
    assert all(torch.equal(tensors[key], value) for key, value in first.tensors.items())
    pipe.fuse_loca(scale=0.5, adapter_names=["first"])
    assert pipe.fused_locas == {"first"}
    assert_near(shown(pipe), expected((first, 0.25), (second, strength)))
    pipe.unfuse_loca()
    assert_near(picture(pipe) if when == "before" else shown(pipe), wanted)
    pipe.delete_loca_adapters("second")
    assert_near(shown(pipe), expected((first, 0.5)))
    pipe.disable_loca()
    assert torch.equal(shown(pipe), base)
    pipe.enable_loca()
    pipe.unload_loca_weights()
    assert (pipe.get_loca_adapters(), pipe.get_active_loca_adapters()) == ({}, [])
    assert torch.equal(shown(pipe), base)


def test_a_compiled_pipeline_is_saved_as_its_base(first: Made, base: Tensor, tmp_path: Path) -> None:
    pipe = compiled(stable_diffusion())
    pipe.load_loca_weights(first.state())
    pipe.save_pretrained(tmp_path)
    again = quiet(StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None))
    assert torch.equal(picture(again), base)


def test_an_offloaded_unet_trains_its_conv_in_whole(base: Tensor) -> None:
    pipe = offloaded(stable_diffusion())
    made = adapter(stable_diffusion(), UNET, whole=CONV_IN)
    pipe.load_loca_weights(made.state())
    assert_near(picture(pipe), expected((made, 1.0)))
    pipe.disable_loca()
    assert torch.equal(picture(pipe), base)
    pipe.unload_loca_weights()
    assert torch.equal(picture(pipe), base)


def test_every_layer_of_the_oracle_is_adapted(pipe: Any) -> None:
    """Or the comparisons here would be with too little."""
    for model in (pipe.unet, pipe.text_encoder):
        wanted = {name for name, _ in layers(model)}
        assert wanted == set(inject(model, LoCAConfig(n_components=2, targets=("q", "k", "v", "out"))))
        assert active_adapters(model) == {"default": 1.0}
        assert isinstance(model, nn.Module)
