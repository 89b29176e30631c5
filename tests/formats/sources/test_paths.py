"""Sources that a pipeline loads adapters from: paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.reference_weights import (
    FILE_NAME,
    Made,
)
from support.sources import Cache, assert_refused


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
