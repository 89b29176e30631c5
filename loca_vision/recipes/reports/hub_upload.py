"""Upload the results of a training run to the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from loca_vision.recipes.reports.redaction import redact
from loca_vision.recipes.settings.yaml_file import write_settings
from loca_vision.storage.atomic_file import write_atomically

CARD = "README.md"


def push(
    folder: Path,
    files: Sequence[str],
    card: Callable[[str], str],
    repository: str | None,
    *,
    message: str,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Upload a finished run with a card, and return its address. Settings in JSON and YAML files reveal no local folder.

    Args:
        folder: the folder of the run.
        files: the names of files in it; missing ones are skipped.
        card: makes the card, given the repository's full name.
        repository: "user/name"; by default the folder's name, under the user who is logged in.
        message: the commit message.
        private: whether a new repository is private.
        token: a token for the hub; by default the one stored on this machine.

    Raises:
        OSError: the hub cannot be reached, or refuses. The run is unchanged.
    """
    from huggingface_hub import HfApi

    name = repository or folder.resolve().name
    try:
        api = HfApi(token=token) if token else HfApi()
        created = api.create_repo(name, private=private, exist_ok=True)
        write_atomically(folder / CARD, card(created.repo_id).encode())
        with TemporaryDirectory() as place:
            shown = [name for name in (CARD, *files) if _copied(folder / name, Path(place))]
            api.upload_folder(repo_id=created.repo_id, folder_path=Path(place), allow_patterns=shown, commit_message=message)
    except Exception as error:  # the library raises its own errors and those of several others
        raise OSError(f"{name}: the run is finished and whole, but not on the hub ({error}); resume it to upload it") from error
    return str(created)


def _copied(file: Path, place: Path) -> bool:
    """Write the public part of a file into a folder; return False if there is no such file."""
    if not file.is_file():
        return False
    data = file.read_bytes()
    if file.suffix == ".json":
        data = (json.dumps(redact(json.loads(data)), indent=1) + "\n").encode()
    elif file.suffix == ".yaml":
        import yaml

        data = write_settings(redact(yaml.safe_load(data))).encode()
    (place / file.name).write_bytes(data)
    return True
