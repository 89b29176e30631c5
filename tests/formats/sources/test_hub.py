"""Sources that a pipeline loads adapters from: hub repositories."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from torch import Tensor

import loca_vision.diffusers
from support.pipelines import picture, stable_diffusion
from support.reference_weights import (
    FILE_NAME,
    Made,
    adapter,
    assert_far,
    assert_near,
    expected,
)
from support.sources import PARTS, Cache, assert_refused


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
        "user/adapter/sub: the hub answered with an error",
    ),
    "a broken connection": (ConnectionResetError("reset by peer"), OSError, "the hub answered with an error: reset by peer"),
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
