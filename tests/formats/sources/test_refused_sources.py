"""Sources that a pipeline loads adapters from: refused sources."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from support.pipelines import unet
from support.reference_weights import (
    FILE_NAME,
    Made,
)
from support.sources import C, PathLike, assert_refused


@pytest.mark.parametrize("source", [None, 7, b"folder", ["folder"], {"folder"}, io.BytesIO(b""), unet], ids=type)
def test_another_kind_of_source_is_refused(source: Any, still: tuple[Any, dict[str, Any]]) -> None:
    kind = type(source).__name__
    assert_refused(still, TypeError, f"source is a {kind}: expected a folder, a file, a hub id or a state dict", source=source)


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"folder"


@pytest.mark.parametrize("source", ["", "fol\0der", "user/adap\0ter", BytesPath()], ids=["empty", "NUL", "NUL too", "bytes"])
def test_a_name_of_nothing_is_refused(source: Any, still: tuple[Any, dict[str, Any]]) -> None:
    assert_refused(still, ValueError, "source=", "expected a folder, a file or a hub id", source=source)


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
