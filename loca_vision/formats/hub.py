"""Files in repositories on the hub, and the errors raised when one is not available."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def may_be_a_repository(text: str) -> bool:
    """Return whether a text that is not a local path could be the name of a repository on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if text.startswith((".", "~", "/")) or text.endswith((".safetensors", ".bin", ".pt")):
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def no_repository(name: str) -> str:
    """Return the error message for a name that is neither a folder nor a repository."""
    return f"{name}: there is no such folder here, and no such repository on the hub that this token may read"


def hub_file(repository: str, name: str, *, subfolder: str | None, revision: str | None, **how: Any) -> Path:
    """Return the local path of a file of a repository, downloading it unless it is cached.

    Args:
        how: further arguments of `hf_hub_download`. HF_HUB_OFFLINE applies whatever `local_files_only` says.

    Raises:
        FileNotFoundError, OSError: the file cannot be found, or the hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, name, subfolder=subfolder, revision=revision, **how))
    except (EntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise _told(error, repository, name, subfolder, revision) from error


def _told(error: Exception, repository: str, name: str, subfolder: str | None, revision: str | None) -> OSError:
    """Reword the hub's error in one sentence. The order of the cases matters: some of the hub's errors subclass others."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repository}/{subfolder}" if subfolder else repository
    if isinstance(error, LocalEntryNotFoundError):
        return FileNotFoundError(
            f"{where}: there is no such folder here, and {name} of a hub repository of that name is not in the cache "
            "and cannot be fetched now (offline, or no connection)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(no_repository(repository))
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{repository}: it has no revision {revision!r}")
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundError(f"{where}: there is no {name} in that repository")
    reason = (str(error).splitlines() or [repr(error)])[0]
    return OSError(f"{where}: the hub answered with an error: {reason}")
