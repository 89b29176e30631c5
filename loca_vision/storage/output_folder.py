"""An output folder that several starts of one run fill, all with the same settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.strict_json import read_json


def claim(folder: Path, file_name: str, about: Mapping[str, Any], what: str) -> None:
    """Make a folder that is new or empty one's own, by a file of settings; or see that it is that already.

    Args:
        file_name: of the settings, as JSON, in the folder.
        about: the settings that everything in the folder depends on, as JSON has them.
        what: is in the folder, in plural, for messages.

    Raises:
        ValueError: something else is in the folder, or it was begun with other settings.
        OSError: the file cannot be written.
    """
    file = folder / file_name
    if not file.exists():
        # names that begin with a dot are temporary files of a killed run, or a file manager's
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
