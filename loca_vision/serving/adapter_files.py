"""Where a store finds its adapters: in a folder, or in a repository on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from loca_vision.formats.adapter_file import FILE_NAME
from loca_vision.formats.hub import may_be_a_repository, no_repository
from loca_vision.formats.sources import Request, locate
from loca_vision.storage.safetensors_file import may_be_read

_NAME = re.compile(r"[A-Za-z0-9_-]{1,100}")
_SUFFIX = ".safetensors"


class AdapterFolder:
    """The adapters `<name>.safetensors` and `<name>/pytorch_loca_weights.safetensors` of a folder; they may come and go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def names(self) -> list[str]:
        """Return the names of all current adapters, sorted."""
        with os.scandir(self.folder) as entries:
            found = [entry.name.removesuffix(_SUFFIX) for entry in entries if _is_adapter(entry)]
        return sorted({name for name in found if _NAME.fullmatch(name)})

    def find(self, name: str) -> Path | None:
        """Return an adapter's file, or None if there is none or the name is not valid for an adapter."""
        if not _NAME.fullmatch(name):
            return None
        for file in (self.folder / f"{name}{_SUFFIX}", self.folder / name / FILE_NAME):
            if file.is_file():
                return file
        return None

    def check(self, file: Path) -> None:
        """Raise ValueError if the file is a link that leaves the folder."""
        if not may_be_read(file, self.folder):
            raise ValueError("it is a link that leaves the folder")


class AdapterRepository:
    """The adapters of a repository on the hub, in the same layout; each is fetched when it is first requested.

    Raises:
        FileNotFoundError, OSError: the hub has no such repository, or cannot be reached and nothing is in the cache.
    """

    def __init__(self, repository: str) -> None:
        self.repository = repository
        self._files = _listed(repository)
        self._found: dict[str, Path] = {}

    def names(self) -> list[str]:
        return sorted({name for file in self._files if _NAME.fullmatch(name := _name_in(file))})

    def find(self, name: str) -> Path | None:
        if name not in self._found:
            for subfolder, file in ((None, f"{name}{_SUFFIX}"), (name, FILE_NAME)):
                if _NAME.fullmatch(name) and (file if subfolder is None else f"{subfolder}/{file}") in self._files:
                    self._found[name] = locate(self.repository, Request(weight_name=file, subfolder=subfolder))
        return self._found.get(name)

    def check(self, file: Path) -> None:
        """Do nothing: the hub's cache consists of links."""


def adapter_files(source: str | os.PathLike[str]) -> AdapterFolder | AdapterRepository:
    """Return the adapters at a source.

    Raises:
        TypeError: the source is neither a path nor a name.
        FileNotFoundError: it is neither a local folder nor a repository.
    """
    if not isinstance(source, (str, os.PathLike)) or isinstance(source, bytes):
        raise TypeError(f"source is a {type(source).__name__}: expected a folder of adapters, or a repository on the hub")
    folder = Path(source)
    if folder.is_dir():
        return AdapterFolder(folder)
    if isinstance(source, str) and not folder.exists() and may_be_a_repository(source):
        return AdapterRepository(source)
    raise FileNotFoundError(f"source={str(source)!r}: there is no such folder")


def _is_adapter(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(_SUFFIX) or (entry.is_dir() and Path(entry.path, FILE_NAME).is_file())


def _name_in(file: str) -> str:
    folder, _, name = file.rpartition("/")
    return folder if name == FILE_NAME and folder else file.removesuffix(_SUFFIX)


def _listed(repository: str) -> set[str]:
    """Return the names of a repository's files; without a connection, those of the cached ones."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        if not constants.HF_HUB_OFFLINE:
            return set(HfApi().list_repo_files(repository))
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(no_repository(repository)) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        pass  # it may be in the cache
    try:
        cached = Path(snapshot_download(repository, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repository}: there is no such folder here, and no repository of that name is in the cache or can be fetched now"
        ) from error
    return {file.relative_to(cached).as_posix() for file in cached.rglob(f"*{_SUFFIX}")}
