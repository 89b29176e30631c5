"""Where a pipeline takes adapters from, and what it refuses: files, folders, the hub's cache, state dicts, hostile ones."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import safetensors.torch
import torch
from conftest import within
from huggingface_hub import errors
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from oracle import (
    FILE_NAME,
    METADATA_KEY,
    Made,
    adapter,
    assert_far,
    assert_near,
    assert_same,
    config,
    expected,
    facts,
    metadata,
)
from tiny import picture, stable_diffusion, stable_diffusion_xl, text_encoder, unet
from torch import Tensor

import loca_vision.diffusers
from loca_vision import LoCAConfig, active_adapters, adapters, inject, load_adapter, save_adapter

PARTS = {"unet": ("q", "v"), "text_encoder": ("q",)}
UNET = {"unet": ("q", "v")}
Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.q"
C, L = f"{Q}.coefficients", f"{Q}.locations"


@pytest.fixture
def pipe() -> Any:
    return stable_diffusion()


@pytest.fixture(scope="module")
def made() -> Made:
    return adapter(stable_diffusion(), PARTS)


@pytest.fixture(scope="module")
def wanted(made: Made) -> Tensor:
    shown = expected((made, 1.0))
    assert_far(shown, picture(stable_diffusion()))
    return shown


@pytest.fixture(scope="module")
def still() -> tuple[Any, dict[str, Any]]:
    """A pipeline with an adapter, that no test here may change, since all loads into it are refused; and its facts."""
    pipe = stable_diffusion()
    pipe.load_loca_weights(adapter(stable_diffusion(), PARTS, seed=7).state(), "here")
    pipe.set_loca_adapters("here", {"unet": {"down": 0.5}, "text_encoder": 0.25})
    return pipe, facts(pipe)


def assert_refused(still: tuple[Any, dict[str, Any]], error: type[Exception], *words: str, **given: Any) -> str:
    """Load into the pipeline that stays as it is, and return what it says."""
    pipe, before = still
    with within(20), pytest.raises(error) as caught:
        pipe.load_loca_weights(given.pop("source"), **given)
    sentence = str(caught.value)
    for word in words:
        assert word in sentence, sentence
    assert sentence.isprintable() and sentence.count("\n") == 0
    assert_same(pipe, before)
    return sentence


# Sound sources


class PathLike:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def folder(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path)
    return path, {}


def folder_by_name(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path)
    return str(path), {}


def folder_with_slash(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path)
    return f"{path}/", {}


def file(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    return made.write(path / "any.safetensors"), {}


def file_by_name(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    return str(made.write(path / "any.safetensors")), {}


def file_without_ending(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    return made.write(path / "any.safetensors").rename(path / "any"), {}


def path_like(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    return PathLike(made.write(path)), {}


def file_of_that_name(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path / "mine.safetensors")
    made.but(format_version=9).write(path)
    return path, {"weight_name": "mine.safetensors"}


def subfolder(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path / "a" / "b")
    made.but(format_version=9).write(path)
    return path, {"subfolder": "a/b"}


def file_of_that_name_in_a_subfolder(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path / "a" / "mine.safetensors")
    return str(path), {"subfolder": "a", "weight_name": "mine.safetensors"}


def link_to_a_folder(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path / "real")
    (path / "link").symlink_to("real")
    return path / "link", {}


def link_to_a_file(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path / "real.safetensors")
    (path / "link.safetensors").symlink_to("real.safetensors")
    return path / "link.safetensors", {}


def link_within_the_folder(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path / "versions" / "2.safetensors")
    (path / FILE_NAME).symlink_to("versions/2.safetensors")
    return path, {}


def snapshot(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    return Cache(path, "user/adapter").add(made, "1" * 40), {}


def snapshot_with_subfolder(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    return Cache(path, "user/adapter").add(made, "1" * 40, f"deep/down/{FILE_NAME}"), {"subfolder": "deep/down"}


def subfolder_of_a_snapshot(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    return Cache(path, "user/adapter").add(made, "1" * 40, f"deep/down/{FILE_NAME}") / "deep" / "down", {}


def state_dict(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    return made.state(), {}


def state_dict_with_an_object(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    return made.state() | {METADATA_KEY: made.about}, {}


def read_only_state_dict(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    return MappingProxyType(OrderedDict(made.state())), {}


SOUND = [
    folder,
    folder_by_name,
    folder_with_slash,
    file,
    file_by_name,
    file_without_ending,
    path_like,
    file_of_that_name,
    subfolder,
    file_of_that_name_in_a_subfolder,
    link_to_a_folder,
    link_to_a_file,
    link_within_the_folder,
    snapshot,
    snapshot_with_subfolder,
    subfolder_of_a_snapshot,
    state_dict,
    state_dict_with_an_object,
    read_only_state_dict,
]


@pytest.mark.parametrize("source", SOUND)
def test_an_adapter_is_found_there(
    source: Callable[[Made, Path], tuple[Any, dict[str, Any]]], pipe: Any, made: Made, wanted: Tensor, tmp_path: Path
) -> None:
    where, named = source(made, tmp_path)
    pipe.load_loca_weights(where, "mine", **named)
    assert pipe.get_active_loca_adapters() == ["mine"]
    assert_near(picture(pipe), wanted)


def test_a_path_from_here(pipe: Any, made: Made, wanted: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it looks like the name of a repository."""
    made.write(tmp_path / "user" / "adapter")
    monkeypatch.chdir(tmp_path)
    for source in ("user/adapter", "./user/adapter", f"user/adapter/{FILE_NAME}"):
        pipe.load_loca_weights(source)
        assert_near(picture(pipe), wanted)


def test_what_is_loaded_is_in_memory(pipe: Any, made: Made, wanted: Tensor, tmp_path: Path) -> None:
    file = made.write(tmp_path)
    pipe.load_loca_weights(tmp_path)
    os.truncate(file, 0)
    assert_near(picture(pipe), wanted)


# State dicts


def test_a_state_dict_is_neither_changed_nor_kept(pipe: Any, made: Made, wanted: Tensor) -> None:
    state = made.state()
    held = dict(state)
    before = {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
    pipe.load_loca_weights(state)
    assert list(state) == list(before) and all(state[key] is held[key] for key in held)
    assert all(torch.equal(held[key], value) for key, value in before.items() if isinstance(value, Tensor))
    for value in state.values():
        if isinstance(value, Tensor):
            value.zero_()
    state.clear()
    assert_near(picture(pipe), wanted)


def test_whole_tensors_of_a_state_dict_are_not_kept_either(pipe: Any) -> None:
    made = adapter(stable_diffusion(), UNET, whole=["unet.conv_in.weight"])
    state = made.state()
    pipe.load_loca_weights(state)
    pipe.disable_loca()
    state["full.unet.conv_in.weight"].zero_()
    pipe.enable_loca()
    assert torch.equal(pipe.unet.conv_in.weight, made.whole["unet.conv_in.weight"])


def test_tensors_of_a_state_dict_may_be_views_that_learn(pipe: Any, made: Made, wanted: Tensor) -> None:
    def strided(value: Tensor) -> Tensor:
        wide = torch.stack([value, torch.zeros_like(value)], dim=1)
        return (wide.requires_grad_() if value.is_floating_point() else wide)[:, 0]

    state = {key: strided(value) if isinstance(value, Tensor) else value for key, value in made.state().items()}
    pipe.load_loca_weights(state)
    assert_near(picture(pipe), wanted)


def test_without_metadata_the_scale_is_one_and_the_log_says_so_once(pipe: Any, caplog: pytest.LogCaptureFixture) -> None:
    made = adapter(stable_diffusion(), PARTS, scale=1.0, n=lambda name: 5 + len(name) % 3)
    with caplog.at_level(logging.INFO):
        pipe.load_loca_weights(made.tensors, "bare")
    assert [(record.levelname, "scale" in record.getMessage()) for record in caplog.records] == [("WARNING", True)]
    assert_near(picture(pipe), expected((made, 1.0)))
    assert METADATA_KEY not in made.tensors


def test_a_state_dict_without_metadata_may_have_whole_tensors(pipe: Any) -> None:
    before = facts(pipe)
    made = adapter(stable_diffusion(), UNET, scale=1.0, whole=["unet.conv_in.weight", "unet.conv_in.bias"])
    pipe.load_loca_weights(made.tensors)
    assert_near(picture(pipe), expected((made, 1.0)))
    pipe.unload_loca_weights()
    assert_same(pipe, before)


def test_it_is_saved_with_its_metadata(pipe: Any, tmp_path: Path) -> None:
    made = adapter(stable_diffusion(), PARTS, scale=1.0)
    pipe.load_loca_weights(made.tensors)
    shown, file = picture(pipe), pipe.save_loca_weights(tmp_path)
    pipe.unload_loca_weights()
    pipe.load_loca_weights(file)
    assert torch.equal(picture(pipe), shown)


def renamed(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    def change(state: dict[str, Any]) -> None:
        state[new] = state.pop(old)

    return change


BARE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "nothing": (lambda s: s.clear(), "no key ends in .coefficients"),
    "locations alone": (
        lambda s: [s.pop(key) for key in list(s) if key.endswith("coefficients")],
        "no key ends in .coefficients",
    ),
    "a LoRA's keys": (lambda s: s.update({"unet.to_q.lora_A.weight": torch.ones(2, 2)}), "unet.to_q.lora_A.weight is unknown"),
    "a misspelt projection": (
        renamed(C, C.replace("mid_block", "middle_block")),
        "the pipeline has no projection unet.middle_block",
    ),
    "no component": (renamed(C, C.removeprefix("unet.")), "the pipeline has no projection mid_block"),
    "an unknown component": (renamed(C, C.replace("unet", "transformer", 1)), "the pipeline has no projection transformer."),
    "one projection less": (lambda s: [s.pop(C), s.pop(L)], "has no update in the file"),
    "coefficients missing": (lambda s: s.pop(C), f"{L} is unknown"),
    "locations missing": (lambda s: s.pop(L), f"{L} is missing"),
    "NaN": (lambda s: s[C].fill_(math.nan), f"{C} holds NaN"),
    "infinity": (lambda s: s[C].fill_(math.inf), f"{C} holds NaN or infinity"),
    "a location outside": (lambda s: s[L].fill_(32 * 32), f"{L} holds 1024"),
    "a negative location": (lambda s: s[L].fill_(-1), f"{L} holds -1"),
    "float locations": (lambda s: s.update({L: s[L].float()}), f"{L} has dtype F32"),
    "coefficients of bfloat16": (lambda s: s.update({C: s[C].bfloat16()}), f"{C} has dtype BF16"),
    "complex coefficients": (lambda s: s.update({C: s[C].to(torch.complex64)}), "torch.complex64"),
    "coefficients of two axes": (lambda s: s.update({C: s[C].view(3, 4)}), f"{C} has shape (3, 4)"),
    "a tensor without values": (lambda s: s.update({C: s[C].to("meta")}), C),
    "a sparse tensor": (lambda s: s.update({C: s[C].to_sparse()}), C),
    "a list for a tensor": (lambda s: s.update({C: s[C].tolist()}), f"{C!r} holds a list"),
    "a key that is no text": (lambda s: s.update({3: torch.ones(1)}), "3 holds a"),
    "an unknown whole tensor": (lambda s: s.update({"full.unet.conv.weight": torch.ones(1)}), "no parameter conv.weight"),
    "a whole tensor of another shape": (lambda s: s.update({"full.unet.conv_in.bias": torch.ones(3)}), "conv_in.bias is (3,)"),
    "a whole tensor of no component": (lambda s: s.update({"full.conv_in.bias": torch.ones(16)}), "conv_in"),
    "metadata of no use": (lambda s: s.update({METADATA_KEY: "{}"}), f"{METADATA_KEY}: it is not an object with"),
    "metadata that is no text": (lambda s: s.update({METADATA_KEY: 7}), f"{METADATA_KEY}: it is not an object with"),
    "metadata that is a tensor": (lambda s: s.update({METADATA_KEY: torch.ones(2)}), "state dict"),
}


@pytest.mark.parametrize("case", BARE)
def test_a_wrong_state_dict_is_refused(case: str, still: tuple[Any, dict[str, Any]], made: Made) -> None:
    change, words = BARE[case]
    state: dict[str, Any] = {key: value.clone() for key, value in made.tensors.items()}
    change(state)
    assert_refused(still, ValueError, "state dict: ", words, source=state)


# What is no source


@pytest.mark.parametrize("source", [None, 7, b"folder", ["folder"], {"folder"}, io.BytesIO(b""), unet], ids=type)
def test_another_kind_of_source_is_refused(source: Any, still: tuple[Any, dict[str, Any]]) -> None:
    kind = type(source).__name__
    assert_refused(still, TypeError, f"source is a {kind}: a folder, a file, a hub id or a state dict is wanted", source=source)


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"folder"


@pytest.mark.parametrize("source", ["", "fol\0der", "user/adap\0ter", BytesPath()], ids=["empty", "NUL", "NUL too", "bytes"])
def test_a_name_of_nothing_is_refused(source: Any, still: tuple[Any, dict[str, Any]]) -> None:
    assert_refused(still, ValueError, "source=", "a folder, a file or a hub id is wanted", source=source)


@pytest.mark.parametrize(
    "source",
    ["./nothing", "nothing", "/no/such/folder", "~/nothing", "a/b/c", "user/adapter.safetensors", "..", "é/ü", "a--b/c"],
)
def test_a_missing_folder_is_called_missing(
    source: str, still: tuple[Any, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "empty" / "here")
    words = (
        "there is no pytorch_loca_weights.safetensors in that folder" if source == ".." else "there is no such file or folder"
    )
    sentence = assert_refused(still, FileNotFoundError, words, source=source)
    assert sentence.startswith(f"{source}: ")


def test_a_missing_path_is_never_asked_of_the_hub(
    still: tuple[Any, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    monkeypatch.chdir(tmp_path)
    assert_refused(still, FileNotFoundError, "there is no such file or folder", source=Path("user/adapter"))
    assert_refused(still, FileNotFoundError, "there is no such file or folder", source=PathLike(Path("user/adapter")))


def test_a_folder_without_the_file_says_what_is_there(still: tuple[Any, dict[str, Any]], made: Made, tmp_path: Path) -> None:
    words = f"{tmp_path}: there is no {FILE_NAME} in that folder"
    assert assert_refused(still, FileNotFoundError, source=tmp_path) == words
    made.write(tmp_path / "other.safetensors")
    assert_refused(still, FileNotFoundError, words, "other.safetensors", source=tmp_path)
    assert_refused(still, FileNotFoundError, "no mine.safetensors", source=tmp_path, weight_name="mine.safetensors")
    assert_refused(still, FileNotFoundError, f"{tmp_path / 'sub'}: ", FILE_NAME, source=tmp_path, subfolder="sub")


class Pickled:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("name", ["pytorch_loca_weights.bin", "pytorch_lora_weights.bin", FILE_NAME, "a.pt"])
@pytest.mark.parametrize("torch_wrote_it", [False, True], ids=["a pickle", "a PyTorch archive"])
def test_a_pickle_is_never_read(torch_wrote_it: bool, name: str, still: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "folder" / name
    path.parent.mkdir()
    state = {C: torch.ones(12), "x": Pickled(mark), "more": [0.0] * 100}
    torch.save(state, path) if torch_wrote_it else path.write_bytes(pickle.dumps(state))
    kind = "a PyTorch archive" if torch_wrote_it else "a pickle"
    words = f"{path}: it is {kind}, which could run code when read"
    assert_refused(still, ValueError, words, source=path)
    assert_refused(still, ValueError, words, source=path.parent, weight_name=name)
    if name == FILE_NAME:
        assert_refused(still, ValueError, words, source=path.parent)
    else:
        assert_refused(still, FileNotFoundError, f"there is no {FILE_NAME} in that folder", source=path.parent)
    assert not mark.exists()
    torch.load(io.BytesIO(path.read_bytes()), weights_only=False) if torch_wrote_it else pickle.loads(path.read_bytes())
    assert mark.exists(), "the pickle was harmless, and nothing was tested"


def test_what_is_no_regular_file_is_refused(still: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / FILE_NAME)
    assert_refused(still, ValueError, "it is not a regular file", source=tmp_path)
    assert_refused(still, ValueError, "it is not a regular file", source=tmp_path / FILE_NAME)
    (tmp_path / "folder.safetensors").mkdir()
    assert_refused(still, ValueError, "it is not a regular file", source=tmp_path, weight_name="folder.safetensors")


# Names that leave the folder


@pytest.mark.parametrize(
    "name",
    [
        *("../x.safetensors", "..", "./../x.safetensors", "a/../../x.safetensors", "/x.safetensors", "a/x.safetensors"),
        *(
            "a\\x.safetensors",
            "..\\x",
            "\\x",
            "C:x.safetensors",
            "C:\\x.safetensors",
            "",
            "x\0.safetensors",
            7,
            ["x"],
            Path("x"),
        ),
    ],
)
def test_a_weight_name_with_a_folder_is_refused(
    name: Any, still: tuple[Any, dict[str, Any]], made: Made, tmp_path: Path
) -> None:
    for where in (tmp_path, tmp_path / "folder", tmp_path / "folder" / "a"):
        made.write(where / "x.safetensors")
        made.write(where)
    assert_refused(still, ValueError, "weight_name=", source=tmp_path / "folder", weight_name=name)
    assert_refused(still, ValueError, "weight_name=", source="user/adapter", weight_name=name, local_files_only=True)


def test_an_absolute_weight_name_that_exists_is_refused(still: tuple[Any, dict[str, Any]], made: Made, tmp_path: Path) -> None:
    file = made.write(tmp_path / "folder" / "x.safetensors")
    assert_refused(still, ValueError, "weight_name=", source=tmp_path / "folder", weight_name=str(file))
    assert_refused(still, ValueError, "subfolder=", source=tmp_path / "folder", subfolder=str(tmp_path / "folder"))


@pytest.mark.parametrize(
    "name", ["..", "../folder", "a/..", "a/../..", "/", "\\a", "..\\folder", "C:a", "", "a\0", 7, Path("a")]
)
def test_a_subfolder_that_leaves_is_refused(name: Any, still: tuple[Any, dict[str, Any]], made: Made, tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "folder", tmp_path / "folder" / "a"):
        made.write(where)
    assert_refused(still, ValueError, "subfolder=", source=tmp_path / "folder", subfolder=name)
    assert_refused(still, ValueError, "subfolder=", source="user/adapter", subfolder=name, local_files_only=True)


def link_of_the_file(made: Made, path: Path) -> dict[str, Any]:
    (path / "folder" / FILE_NAME).symlink_to(made.write(path / "outside"))
    return {}


def link_of_a_named_file(made: Made, path: Path) -> dict[str, Any]:
    made.write(path / "outside")
    (path / "folder" / "x.safetensors").symlink_to(f"../outside/{FILE_NAME}")
    return {"weight_name": "x.safetensors"}


def link_of_the_subfolder(made: Made, path: Path) -> dict[str, Any]:
    made.write(path / "outside")
    (path / "folder" / "sub").symlink_to(path / "outside")
    return {"subfolder": "sub"}


def link_of_a_link(made: Made, path: Path) -> dict[str, Any]:
    (path / "folder" / "inner.safetensors").symlink_to(made.write(path / "outside"))
    (path / "folder" / FILE_NAME).symlink_to("inner.safetensors")
    return {}


def link_to_a_neighbour_of_like_name(made: Made, path: Path) -> dict[str, Any]:
    (path / "folder" / FILE_NAME).symlink_to(made.write(path / "folder_of_another"))
    return {}


@pytest.mark.parametrize(
    "link",
    [link_of_the_file, link_of_a_named_file, link_of_the_subfolder, link_of_a_link, link_to_a_neighbour_of_like_name],
)
def test_a_link_that_leaves_the_folder_is_refused(
    link: Callable[[Made, Path], dict[str, Any]], still: tuple[Any, dict[str, Any]], made: Made, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    named = link(made, tmp_path)
    assert_refused(still, ValueError, "it is a link that leaves the folder", source=tmp_path / "folder", **named)


def test_a_snapshot_may_link_to_its_own_blobs_only(still: tuple[Any, dict[str, Any]], made: Made, tmp_path: Path) -> None:
    one, other = Cache(tmp_path, "user/one"), Cache(tmp_path, "user/other")
    other.add(made, "1" * 40)
    here = one.add(made, "2" * 40)
    (here / FILE_NAME).unlink()
    (here / FILE_NAME).symlink_to(next((other.top / "blobs").iterdir()))
    assert_refused(still, ValueError, "it is a link that leaves the folder", source=here)


# One model's files and a pipeline's


@torch.no_grad()
def scatter(model: Any, name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for spectrum in adapters(model, name).values():
        spectrum.coefficients.copy_(torch.randn(spectrum.coefficients.shape, generator=generator))


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_a_file_of_one_model_goes_into_a_pipeline(component: str, pipe: Any, tmp_path: Path) -> None:
    trained = stable_diffusion()
    model = getattr(trained, component)
    inject(model, LoCAConfig(n_components=9, scale=3.0, targets=("q", "out")), "trained")
    scatter(model, "trained")
    file = save_adapter(model, tmp_path, "trained")
    base = picture(pipe)
    pipe.load_loca_weights(file)
    assert pipe.get_loca_adapters() == {component: ["default_0"]}
    assert torch.equal(picture(pipe), picture(trained))
    assert_far(picture(pipe), base)
    assert torch.equal(picture(pipe, cross_attention_kwargs={"scale": 0.0}), base)
    saved = safetensors.torch.load_file(pipe.save_loca_weights(tmp_path / "again"))
    assert {key.partition(".")[0] for key in saved} == {component}


def test_a_file_of_one_model_with_its_conv_in_goes_into_a_pipeline(pipe: Any, tmp_path: Path) -> None:
    trained = stable_diffusion()
    inject(trained.unet, LoCAConfig(n_components=9), "trained")
    trained.unet.conv_in.requires_grad_(True)
    scatter(trained.unet, "trained")
    with torch.no_grad():
        trained.unet.conv_in.weight.mul_(1.5)
    pipe.load_loca_weights(save_adapter(trained.unet, tmp_path, "trained"))
    assert torch.equal(picture(pipe), picture(trained))


def test_a_file_of_another_model_is_refused(still: tuple[Any, dict[str, Any]], tmp_path: Path) -> None:
    made = adapter(stable_diffusion(), UNET)
    bare = {key.removeprefix("unet."): value for key, value in made.tensors.items()}
    shapes = {key.removeprefix("unet."): value for key, value in made.about["shapes"].items()}
    about = metadata(config(12, ("q", "v"), 2.0), shapes, base_model="UNet3DConditionModel")
    file = Made(bare, about).write(tmp_path)
    assert_refused(still, ValueError, "it was trained on a UNet3DConditionModel, of which the pipeline has 0", source=file)
    Made(bare, about | {"base_model": "UNet2DConditionModel"}).write(tmp_path)
    pipe = stable_diffusion()
    pipe.load_loca_weights(file)
    assert_near(picture(pipe), expected((made, 1.0)))


def test_a_pipelines_file_of_one_component_goes_into_that_model(pipe: Any, tmp_path: Path) -> None:
    for component, model in (("unet", unet()), ("text_encoder", text_encoder())):
        made = adapter(stable_diffusion(), {component: ("q", "v")}, name="mine")
        names = load_adapter(model, made.write(tmp_path / component))
        assert set(names) == {name.removeprefix(f"{component}.") for name in made.updates}
        assert active_adapters(model) == {"mine": 1.0}
        for projection, spectrum in adapters(model, "mine").items():
            assert_near(spectrum.delta().detach().double(), made.updates[f"{component}.{projection}"])
        setattr(pipe, component, model)
        assert_near(picture(pipe), expected((made, 1.0)))
        pipe.unload_loca_weights()


def test_a_pipelines_file_of_two_components_does_not_go_into_one_model(made: Made, tmp_path: Path) -> None:
    model = unet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"it is for unet, text_encoder of a pipeline: use load_loca_weights"):
        load_adapter(model, made.write(tmp_path))
    assert active_adapters(model) == {}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_a_file_of_the_other_component_does_not_go_into_a_model(tmp_path: Path) -> None:
    model = unet()
    with pytest.raises(ValueError, match=r"the model has no projection .*self_attn\.q"):
        load_adapter(model, adapter(stable_diffusion(), {"text_encoder": ("q",)}).write(tmp_path))
    assert active_adapters(model) == {}


# Hostile files


def about(change: Callable[[dict[str, Any]], object]) -> Callable[[Made], Made]:
    """Change a copy of the metadata."""

    def broken(made: Made) -> Made:
        fields = json.loads(json.dumps(made.about))
        change(fields)
        return Made(made.tensors, fields)

    return broken


def tensor(key: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Made], Made]:
    return lambda made: made.with_tensors(**{key: change(made.tensors[key].clone())})


def moved(made: Made, old: str, new: str) -> Made:
    """Another name for a component."""

    def name(key: str) -> str:
        return f"{new}{key[len(old) :]}" if key.startswith(f"{old}.") else key

    configs = {new if component == old else component: value for component, value in made.about["config"].items()}
    shapes = {name(key): value for key, value in made.about["shapes"].items()}
    return Made({name(key): value for key, value in made.tensors.items()}, made.about | {"config": configs, "shapes": shapes})


def without(made: Made) -> Made:
    shapes = {key: value for key, value in made.about["shapes"].items() if key != Q}
    return made.with_tensors(**{C: None, L: None}).but(shapes=shapes)


def with_projection(name: str) -> Callable[[Made], Made]:
    def broken(made: Made) -> Made:
        more = {f"{name}.coefficients": torch.ones(12), f"{name}.locations": torch.zeros(12, dtype=torch.int32)}
        return made.with_tensors(**more).but(shapes=made.about["shapes"] | {name: [32, 32]})

    return broken


def wide(made: Made) -> Made:
    return made.but(shapes=made.about["shapes"] | {Q: [32, 64]})


def whole(name: str, value: Tensor) -> Callable[[Made], Made]:
    return lambda made: made.with_tensors(**{f"full.{name}": value}).but(whole=[name])


HOSTILE: dict[str, tuple[Callable[[Made], Made], str]] = {
    "an unknown component": (
        lambda m: moved(m, "unet", "transformer"),
        "the component transformer, which the pipeline has not",
    ),
    "a component that is no model": (
        lambda m: moved(m, "unet", "tokenizer"),
        "the component tokenizer, which the pipeline has not",
    ),
    "a component that is None": (lambda m: moved(m, "unet", "safety_checker"), "the component safety_checker"),
    "a component without such projections": (lambda m: moved(m, "unet", "vae"), "has no projection down_blocks"),
    "components exchanged": (
        lambda m: moved(moved(moved(m, "unet", "x"), "text_encoder", "unet"), "x", "text_encoder"),
        "no projection",
    ),
    "a method for a component": (lambda m: moved(m, "unet", "__class__"), "the component __class__"),
    "a path for a component": (lambda m: moved(m, "unet", "../unet"), "belongs to none of the components ../unet"),
    "a configuration without projections": (about(lambda f: f["config"].update(vae=f["config"]["unet"])), "config: 'vae'"),
    "a component without configuration": (
        about(lambda f: f["config"].pop("text_encoder")),
        "belongs to none of the components unet",
    ),
    "no component": (about(lambda f: f.update(config={})), "config"),
    "a projection less": (without, "the model's projection mid_block.attentions.0.transformer_blocks.0.attn1.q has no update"),
    "a projection more": (with_projection("unet.mid_block.attn.q"), "the model has no projection mid_block.attn.q"),
    "a projection of no component": (with_projection("mid_block.attn.q"), "mid_block.attn.q belongs to none of the components"),
    "a projection that is a layer": (with_projection("unet.conv_in"), "the model has no projection conv_in"),
    "a target more": (about(lambda f: f["config"]["unet"]["targets"].append("k")), "k has no update"),
    "a target less": (about(lambda f: f["config"]["unet"]["targets"].remove("v")), "no projection"),
    "another shape": (wide, "is (32, 64) in the file and (32, 32) in the model"),
    "coefficients missing": (tensor(C, lambda t: None), f"{C} is missing"),
    "locations missing": (tensor(L, lambda t: None), f"{L} is missing"),
    "an unknown tensor": (lambda m: m.with_tensors(surprise=torch.ones(3)), "surprise is unknown"),
    "NaN": (tensor(C, lambda t: t.fill_(math.nan)), f"{C} holds NaN"),
    "NaN in the second component": (
        lambda m: m.with_tensors(
            **{k: v * math.nan for k, v in m.tensors.items() if k.startswith("text_") and k.endswith("nts")}
        ),
        "holds NaN",
    ),
    "infinity": (tensor(C, lambda t: t.fill_(-math.inf)), f"{C} holds NaN or infinity"),
    "too large together": (tensor(C, lambda t: t.fill_(1e38)), f"{C} times the scale 2.0 overflows"),
    "a location outside": (tensor(L, lambda t: t.fill_(1024)), f"{L} holds 1024: a 32 x 32 matrix has cells 0 to 1023"),
    "a negative location": (tensor(L, lambda t: t.fill_(-1)), f"{L} holds -1"),
    "int64 locations": (tensor(L, lambda t: t.long()), f"{L} has dtype I64"),
    "bfloat16 coefficients": (tensor(C, lambda t: t.bfloat16()), f"{C} has dtype BF16"),
    "another count": (tensor(C, lambda t: t[:-1].clone()), f"{C} has shape (11,): by the settings it is (12,)"),
    "10**9 components": (about(lambda f: f["config"]["unet"].update(n_components=10**9)), "1000000000 components, of"),
    "an unknown version": (lambda m: m.but(format_version=2), "format_version=2"),
    "another method": (lambda m: m.but(method="lokr"), "method='lokr'"),
    "a field more": (lambda m: m.but(auto_map="x"), "['auto_map']"),
    "scale 0": (about(lambda f: f["config"]["unet"].update(scale=0)), "scale=0"),
    "conv_in of fewer channels": (
        whole("unet.conv_in.weight", torch.ones(16, 3, 3, 3)),
        "full.conv_in.weight is (16, 3, 3, 3)",
    ),
    "conv_in that overflows": (
        whole("unet.conv_in.bias", torch.full((16,), 1e300, dtype=torch.float64)),
        "overflows torch.float32",
    ),
    "conv_in with NaN": (whole("unet.conv_in.bias", torch.full((16,), math.nan)), "full.unet.conv_in.bias holds NaN"),
    "a whole tensor of no component": (whole("conv_in.bias", torch.ones(16)), "conv_in.bias belongs to none of the components"),
    "a whole tensor of another component": (whole("vae.conv_in.bias", torch.ones(16)), "belongs to none of the components"),
    "a whole tensor of the adapter here": (
        whole(f"{Q.replace('attn1.q', 'attn1')}.loca.weights.on_q.updates.0.coefficients", torch.ones(12)),
        "has no parameter",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("kind", ["file", "state dict"])
def test_a_hostile_adapter_is_refused_and_nothing_is_touched(
    kind: str, case: str, still: tuple[Any, dict[str, Any]], made: Made, tmp_path: Path
) -> None:
    change, words = HOSTILE[case]
    broken = change(made)
    source: Any = broken.write(tmp_path) if kind == "file" else broken.state()
    sentence = assert_refused(still, ValueError, words, source=source)
    assert sentence.startswith(f"{source}: " if kind == "file" else "state dict: ")


def test_the_adapter_that_the_broken_ones_are_made_from_is_sound(pipe: Any, made: Made, wanted: Tensor, tmp_path: Path) -> None:
    pipe.load_loca_weights(made.write(tmp_path))
    assert_near(picture(pipe), wanted)


@pytest.mark.parametrize("at", [0, 7, 100, -1])
def test_a_file_cut_short_is_refused(at: int, still: tuple[Any, dict[str, Any]], made: Made, tmp_path: Path) -> None:
    file = made.write(tmp_path)
    file.write_bytes(file.read_bytes()[:at])
    assert_refused(still, ValueError, f"{file}: ", source=tmp_path)


def test_what_overflows_half_precision_is_refused_there(tmp_path: Path) -> None:
    pipe = stable_diffusion().to(torch.float16)
    made = adapter(stable_diffusion(), UNET, whole=["unet.conv_in.weight"])
    key = "full.unet.conv_in.weight"
    file = made.with_tensors(**{key: made.tensors[key] + 1e5}).write(tmp_path)
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with pytest.raises(ValueError, match=r"full\.conv_in\.weight overflows torch\.float16"):
        pipe.load_loca_weights(file)
    assert pipe.get_loca_adapters() == {}
    assert all(torch.equal(pipe.unet.state_dict()[name], value) for name, value in before.items())


def test_an_adapter_of_another_pipeline_is_refused(tmp_path: Path) -> None:
    """SDXL's has other blocks and a second text encoder."""
    pipe, other = stable_diffusion(), stable_diffusion_xl()
    for made, words in (
        (
            adapter(other, {"text_encoder_2": ("q",), "unet": ("q",)}),
            "the component text_encoder_2, which the pipeline has not",
        ),
        (adapter(other, {"unet": ("q",)}), "no projection|in the file and"),
    ):
        before = facts(pipe)
        with pytest.raises(ValueError, match=words):
            pipe.load_loca_weights(made.write(tmp_path))
        assert_same(pipe, before)
    made = adapter(pipe, {"text_encoder": ("q", "v")}, size=3.0)
    other.load_loca_weights(made.state())  # its first text encoder is built like that one
    assert_near(picture(other), expected((made, 1.0), make=stable_diffusion_xl))


def test_of_two_text_encoders_the_sentence_names_the_one(tmp_path: Path) -> None:
    pipe = stable_diffusion_xl()
    for component in ("text_encoder", "text_encoder_2"):
        made = adapter(stable_diffusion_xl(), {"text_encoder": ("q",), "text_encoder_2": ("q",)})
        first = next(name for name in made.about["shapes"] if name.startswith(f"{component}."))
        rows, cols = made.about["shapes"][first]
        for shapes in (
            {name: shape for name, shape in made.about["shapes"].items() if name != first},
            made.about["shapes"] | {first: [rows, 2 * cols]},
        ):
            tensors = {key: value for key, value in made.tensors.items() if key.rpartition(".")[0] in shapes}
            with pytest.raises(ValueError, match=rf"\b{component}\b"):
                pipe.load_loca_weights(Made(tensors, made.about | {"shapes": shapes}).state())
    assert pipe.get_loca_adapters() == {}


# The hub


class Cache:
    """A repository in a cache of the hub, as huggingface_hub lays it out."""

    def __init__(self, folder: Path, repository: str) -> None:
        self.top = folder / f"models--{repository.replace('/', '--')}"
        (self.top / "blobs").mkdir(parents=True)
        (self.top / "refs").mkdir()

    def add(self, made: Made, commit: str, name: str = FILE_NAME, *refs: str) -> Path:
        """Put a file into the snapshot of a commit, at which the branches `refs` are then."""
        blob = self.top / "blobs" / f"{len(list((self.top / 'blobs').iterdir())):064x}"
        made.write(blob.with_suffix(".safetensors")).rename(blob)
        link = self.top / "snapshots" / commit / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        for ref in refs:
            (self.top / "refs" / ref).write_text(commit)
        return self.top / "snapshots" / commit


@pytest.fixture
def cache(made: Made, tmp_path: Path) -> Path:
    """`user/adapter`: the adapter at main, in a subfolder and under another name; others at other revisions."""
    repository = Cache(tmp_path, "user/adapter")
    repository.add(made, "1" * 40, FILE_NAME, "main")
    repository.add(made, "1" * 40, f"sub/deep/{FILE_NAME}")
    repository.add(made, "1" * 40, "other.safetensors")
    repository.add(adapter(stable_diffusion(), PARTS, seed=2), "2" * 40, FILE_NAME, "v2")
    return tmp_path


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"subfolder": "sub/deep"},
        {"weight_name": "other.safetensors"},
        {"revision": "main"},
        {"revision": "1" * 40},
        {"token": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("offline", [True, None], ids=["local_files_only", "HF_HUB_OFFLINE"])
def test_a_repository_is_read_from_the_cache(
    offline: bool | None, given: dict[str, Any], cache: Path, pipe: Any, wanted: Tensor
) -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    pipe.load_loca_weights("user/adapter", cache_dir=cache, local_files_only=offline, **given)
    assert_near(picture(pipe), wanted)


@pytest.mark.parametrize("revision", ["v2", "2" * 40])
def test_another_revision_is_another_adapter(revision: str, cache: Path, pipe: Any, wanted: Tensor) -> None:
    pipe.load_loca_weights("user/adapter", cache_dir=str(cache), revision=revision, local_files_only=True)
    shown = picture(pipe)
    assert_near(shown, expected((adapter(stable_diffusion(), PARTS, seed=2), 1.0)))
    assert_far(shown, wanted)


@pytest.mark.parametrize(
    ("source", "given"),
    [
        ("user/adapter", {"weight_name": "no.safetensors"}),
        ("user/adapter", {"subfolder": "nowhere"}),
        ("user/adapter", {"revision": "v3"}),
        ("user/adapter", {"revision": "3" * 40}),
        ("user/missing", {}),
    ],
    ids=["missing entry", "missing subfolder", "missing branch", "missing commit", "missing repository"],
)
def test_what_is_not_in_the_cache_is_said_to_be_missing(
    source: str, given: dict[str, Any], cache: Path, still: tuple[Any, dict[str, Any]]
) -> None:
    name = given.get("weight_name", FILE_NAME)
    for offline in (True, None):
        words = ("there is no such folder here", name, "is not in the cache")
        sentence = assert_refused(
            still, FileNotFoundError, *words, source=source, cache_dir=cache, local_files_only=offline, **given
        )
        assert sentence.startswith(source) and "weight_name" not in sentence.replace(name, "")


def test_a_broken_file_in_the_cache_is_refused_like_any_other(
    cache: Path, still: tuple[Any, dict[str, Any]], made: Made
) -> None:
    repository = Cache(cache, "user/broken")
    link = repository.add(made.but(format_version=9), "1" * 40, FILE_NAME, "main") / FILE_NAME
    assert_refused(still, ValueError, f"{link}: ", "format_version=9", source="user/broken", cache_dir=cache)


ARGUMENTS = {
    "weight_name": "w.safetensors",
    "subfolder": "s/t",
    "revision": "v1",
    "token": "hf_secret",
    "cache_dir": "/some/cache",
    "local_files_only": True,
    "force_download": True,
}


@pytest.mark.parametrize("given", [{}, *({name: value} for name, value in ARGUMENTS.items()), ARGUMENTS], ids=list)
def test_every_argument_reaches_the_hub(
    given: dict[str, Any], pipe: Any, made: Made, wanted: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[dict[str, Any]] = []

    def download(repo_id: str, filename: str, **named: Any) -> str:
        heard.append({"repo_id": repo_id, "filename": filename} | named)
        return str(made.write(tmp_path))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    pipe.load_loca_weights("user/adapter", **given)
    assert_near(picture(pipe), wanted)
    (got,) = heard
    assert (got.pop("repo_id"), got.pop("filename")) == ("user/adapter", given.get("weight_name", FILE_NAME))
    unsaid = {"subfolder": None, "revision": None, "token": None, "cache_dir": None}
    unsaid |= {"force_download": False, "local_files_only": False}
    assert unsaid | got == unsaid | {name: value for name, value in given.items() if name != "weight_name"}


RESPONSE: Any = SimpleNamespace(headers={}, request=None)
NoFile: Any = getattr(errors, "RemoteEntryNotFoundError", errors.EntryNotFoundError)  # as the version has it

FAULTS: dict[str, tuple[Exception, type[Exception], str]] = {
    "no repository": (
        RepositoryNotFoundError("404", response=RESPONSE),
        FileNotFoundError,
        "user/adapter: there is no such folder here, and no such repository on the hub that this token may read",
    ),
    "a gated repository": (GatedRepoError("403", response=RESPONSE), FileNotFoundError, "that this token may read"),
    "no revision": (
        RevisionNotFoundError("404", response=RESPONSE),
        FileNotFoundError,
        "user/adapter: it has no revision 'v1'",
    ),
    "no file": (
        NoFile("404", response=RESPONSE),
        FileNotFoundError,
        f"user/adapter/sub: there is no {FILE_NAME} in that repository",
    ),
    "no connection": (LocalEntryNotFoundError("offline"), FileNotFoundError, "cannot be fetched now"),
    "a server's fault": (
        HfHubHTTPError("503 Busy\nmore", response=RESPONSE),
        OSError,
        "user/adapter/sub: the hub did not answer",
    ),
    "a broken connection": (ConnectionResetError("reset by peer"), OSError, "the hub did not answer as hoped: reset by peer"),
    "a full disk": (OSError(28, "No space left on device"), OSError, "No space left on device"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_goes_wrong_on_the_hub_is_said_in_a_sentence(
    case: str, still: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault, kind, words = FAULTS[case]

    def download(*_: Any, **__: Any) -> str:
        raise fault

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    named = {"revision": "v1", "subfolder": "sub", "token": "hf_secret"}
    assert "hf_secret" not in assert_refused(still, kind, words, source="user/adapter", **named)


def test_nothing_of_the_hub_is_asked_for_what_is_here(
    pipe: Any, made: Made, wanted: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    pipe.load_loca_weights(made.write(tmp_path), revision="main", force_download=True, token="hf_secret")
    assert_near(picture(pipe), wanted)


def test_functions_read_the_same_sources(pipe: Any, cache: Path, wanted: Tensor) -> None:
    loca_vision.diffusers.load_loca_weights(pipe, "user/adapter", "mine", cache_dir=cache, subfolder="sub/deep")
    assert pipe.get_active_loca_adapters() == ["mine"]
    assert_near(picture(pipe), wanted)
