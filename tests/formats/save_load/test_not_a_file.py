"""save_adapter and load_adapter: paths that are not adapter files."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from loca_vision import load_adapter, save_adapter
from loca_vision.formats.adapter_file import FILE_NAME
from support.adapter_files import NAME, assert_same, trained
from support.time_limit import within


def pickled(file: Path) -> str:
    file.write_bytes(pickle.dumps({"state": [1.0] * 100}))
    return "it is a pickle"


def saved_by_torch(file: Path) -> str:
    torch.save({"weight": torch.ones(3)}, file)
    return "it is a PyTorch archive"


def saved_by_old_torch(file: Path) -> str:
    torch.save({"weight": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    return "it is a pickle"


def fifo(file: Path) -> str:
    os.mkfifo(file)
    return "it is not a regular file"


def fifo_in_a_folder(file: Path) -> str:
    file.mkdir()
    os.mkfifo(file / FILE_NAME)
    return f"{FILE_NAME}: it is not a regular file"


def folder_as_file_in_a_folder(file: Path) -> str:
    (file / FILE_NAME).mkdir(parents=True)
    return f"{FILE_NAME}: it is not a regular file"


def device(file: Path) -> str:
    file.symlink_to("/dev/zero")
    return "it is not a regular file"


@pytest.mark.parametrize(
    "make", [pickled, saved_by_torch, saved_by_old_torch, fifo, fifo_in_a_folder, folder_as_file_in_a_folder, device]
)
def test_what_is_no_safetensors_file(
    make: Callable[[Path], str], model: nn.Module, untouched: dict[str, Any], tmp_path: Path
) -> None:
    words = make(tmp_path / NAME)
    with within(5), pytest.raises(ValueError) as caught:
        load_adapter(model, tmp_path / NAME)
    assert NAME in str(caught.value) and words in str(caught.value)
    assert_same(model, untouched)


def nothing(folder: Path) -> tuple[Path, str]:
    return folder / NAME, "there is no such file"


def link_to_itself(folder: Path) -> tuple[Path, str]:
    (folder / NAME).symlink_to(NAME)
    return folder / NAME, "there is no such file"


def link_to_nothing(folder: Path) -> tuple[Path, str]:
    (folder / NAME).symlink_to("nothing")
    return folder / NAME, "there is no such file"


def below_a_file(folder: Path) -> tuple[Path, str]:
    (folder / "file").write_bytes(b"")
    return folder / "file" / NAME, "there is no such file"


def empty_folder(folder: Path) -> tuple[Path, str]:
    (folder / NAME).mkdir()
    return folder / NAME, f"there is no {FILE_NAME} in that folder"


def folder_of_a_pickle(folder: Path) -> tuple[Path, str]:
    (folder / NAME).mkdir()
    torch.save({}, folder / NAME / "pytorch_loca_weights.bin")
    return folder / NAME, "pytorch_loca_weights.bin is there, but a pickle could run code"


@pytest.mark.parametrize("make", [nothing, link_to_itself, link_to_nothing, below_a_file, empty_folder, folder_of_a_pickle])
def test_what_is_not_there(
    make: Callable[[Path], tuple[Path, str]], model: nn.Module, untouched: dict[str, Any], tmp_path: Path
) -> None:
    path, words = make(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        load_adapter(model, path)
    assert str(caught.value).startswith(f"{path}: ") and words in str(caught.value)
    assert_same(model, untouched)


def test_nul_in_a_path(model: nn.Module, untouched: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter\\x00\.safetensors': a path holds no NUL"):
        load_adapter(model, tmp_path / "adapter\0.safetensors")
    with pytest.raises(ValueError, match="a path holds no NUL"):
        save_adapter(trained(), tmp_path / "adapter\0.safetensors")
    assert_same(model, untouched)
