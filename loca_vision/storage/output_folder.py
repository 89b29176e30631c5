"""An output folder that a run fills, possibly over several starts, always with the same settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.strict_json import read_json


def claim(folder: Path, file_name: str, about: Mapping[str, Any], what: str) -> None:
    """Claim a new or empty folder by writing a file of settings, or check that it has been claimed with the same settings.

    Args:
        folder: the output folder.
        file_name: the name of the JSON file of settings in the folder.
        about: the settings that everything in the folder depends on, as JSON values.
        what: the plural noun for the contents of the folder, for messages.

    Raises:
        ValueError: something else is in the folder, or it was claimed with other settings.
        OSError: the file cannot be written.
    """
    file = folder / file_name
    if not file.exists():
        # names that begin with a dot are temporary files of a killed run, or belong to a file manager
        if folder.exists() and (not folder.is_dir() or any(not found.name.startswith(".") for found in folder.iterdir())):
            raise ValueError(f"output={str(folder)!r}: something else is there; choose a folder that is new or empty")
        write_atomically(file, (json.dumps(about, indent=1) + "\n").encode())
    there = read_json(file)
    for name in about:
        if not isinstance(there, dict) or there.get(name) != about[name]:
            before = there.get(name) if isinstance(there, dict) else None
            raise ValueError(
                f"{file}: the {what} there were made with {name}={before!r}, not {about[name]!r}; choose another folder"
            )
