"""Make a run's settings fit to be published: without local folders, and without keys in addresses."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit


def redact(value: Any) -> Any:
    """Return JSON content with every path that reveals a machine cut to its last name, and addresses without their secrets.

    Such paths are absolute, begin with `~`, or go up with `..`. An address loses everything before an @ and after a question
    mark, where signed links have their keys. Instructions, whose keys end in "prompt", stay as they are.
    """
    if isinstance(value, dict):
        return {key: item if str(key).endswith("prompt") else redact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    return _text(value) if isinstance(value, str) else value


def tells_a_place(text: str) -> bool:
    """Return whether a text is a path on some machine, rather than a name on the hub or a path below the working directory."""
    windows = PureWindowsPath(text)
    return bool(windows.drive) or text.startswith(("/", "\\", "~")) or ".." in windows.parts


def _text(text: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
        parts = urlsplit(text)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    if not tells_a_place(text):
        return text
    path = PureWindowsPath(text) if "\\" in text else PurePosixPath(text)
    return path.name if path.name not in ("", "..", "~") else "."
