"""Sources that a pipeline loads adapters from: valid sources."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from torch import Tensor

from support.pipelines import picture
from support.reference_weights import (
    FILE_NAME,
    METADATA_KEY,
    Made,
    assert_near,
)
from support.sources import Cache, PathLike, file, folder, subfolder


def folder_by_name(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path)
    return str(path), {}


def folder_with_slash(made: Made, path: Path) -> tuple[Any, dict[str, Any]]:
    made.write(path)
    return f"{path}/", {}


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
