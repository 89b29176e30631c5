"""Where pairs are read from: a local folder or file, or a data set on the hub, which is decided before reading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loca_vision.data.image_files import list_images
from loca_vision.formats.hub import may_be_a_repository

_SAVED_TO_DISK = ("dataset_dict.json", "state.json")


def place_of(source: str, split: str, *, revision: str | None, config: str | None) -> tuple[str, dict[str, Any]]:
    """Return the first arguments of `datasets.load_dataset` for a source.

    Raises:
        FileNotFoundError: there is no such folder or file, or nothing to read in it.
        ValueError: the folder was written by `save_to_disk`, or a config is given for a local source.
    """
    path = Path(source).expanduser()
    if config is not None and path.exists():
        raise ValueError(
            f"dataset_config_name={config!r}: only a data set on the hub has configurations, and {source} is on this machine"
        )
    if path.is_dir():
        return _kind_of(path), {"data_dir": str(path)}
    if path.is_file():
        return "parquet", {"data_files": {split: str(path)}}
    if is_missing(source):
        raise FileNotFoundError(f"{source}: there is no such folder or file; a data set on the hub is named as in user/name")
    return source, {"revision": revision, "name": config}


def is_missing(source: str) -> bool:
    """Return whether a text that names nothing on this machine is meant as a path, not as a repository on the hub.

    It is if it cannot be the name of a repository, or if the folder that it would be in exists.
    """
    path = Path(source).expanduser()
    if path.exists():
        return False
    return not may_be_a_repository(source) or path.parent.is_dir()


def _kind_of(folder: Path) -> str:
    for name in _SAVED_TO_DISK:
        if (folder / name).is_file() or any(folder.glob(f"*/{name}")):
            raise ValueError(
                f"{folder}: expected images with metadata.jsonl or parquet files, got the output of datasets' "
                "save_to_disk; write parquet files instead: load_from_disk(...).to_parquet('parquet/train.parquet')"
            )
    if any(file.name != "metadata.parquet" for file in folder.rglob("*.parquet")):
        return "parquet"
    if not list_images(folder).images:
        raise FileNotFoundError(f"{folder}: expected images with metadata.jsonl, or parquet files, got a folder without any")
    return "imagefolder"
