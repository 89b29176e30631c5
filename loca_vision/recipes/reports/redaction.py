"""Settings of a run fit to be published: without folders of the machine, without keys in addresses."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import urlsplit, urlunsplit


def redact(value: Any) -> Any:
    """What JSON holds, with every path that tells of a machine cut to its last name, and addresses without their secrets.

    Such paths are absolute, begin with `~`, or climb with `..`. Of an address goes what stands before an @ and behind a
    question mark, where signed links have their keys. Instructions, whose keys end in "prompt", stay as they are.
    """
    if isinstance(value, dict):
        return {key: item if str(key).endswith("prompt") else redact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [redact(item) for item in value]
    return _text(value) if isinstance(value, str) else value


def tells_a_place(text: str) -> bool:
    """Whether a text is a path of some machine, and no name on the hub and none that is relative to where one works."""
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
