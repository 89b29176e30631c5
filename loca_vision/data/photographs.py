"""From a folder of photographs to pairs of crop and cartoon: which parts of which photographs, as a function of content."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from loca_vision.data.image_files import list_images


@dataclass(frozen=True)
class Photograph:
    """A photograph, identified by the contents of its file.

    Args:
        file: its path; among several with the same contents, the first by name.
        content: SHA-256 of the file, 64 hexadecimal digits.
    """

    file: Path
    content: str

    @property
    def name(self) -> str:
        """16 hexadecimal digits: short, and the same wherever the file lies."""
        return self.content[:16]


def photographs_in(folder: Path) -> list[Photograph]:
    """Return every image file in a folder and its subfolders, each content once, in the order of contents.

    An image is recognised by its ending, which may be any that PIL reads. Hidden files and the output of runs are left out.

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such folder of photographs")
    files: dict[str, Path] = {}
    for file in list_images(folder).images:
        files.setdefault(sha256(file.read_bytes()).hexdigest(), file)
    if not files:
        raise FileNotFoundError(f"{folder}: there is no image in it that PIL reads")
    return [Photograph(files[content], content) for content in sorted(files)]
