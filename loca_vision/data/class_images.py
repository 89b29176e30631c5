"""Images of a class, for the prior preservation of DreamBooth: which are there, which are missing, how those made are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from loca_vision.checks import check_count
from loca_vision.data.image_files import list_images
from loca_vision.data.images import as_png
from loca_vision.storage.atomic_file import write_atomically


@dataclass(frozen=True)
class ClassImages:
    """What `class_images` found.

    Args:
        folder: where they lie.
        there: the images of any names, at any depth, in the order of their paths.
        missing: the numbers of those that are still to be made, in order; none where `there` are as many as are wanted or
            more.
    """

    folder: Path
    there: tuple[Path, ...]
    missing: tuple[int, ...]

    def write(self, number: int, image: Image.Image) -> Path:
        """Keep an image that was made, whole or not at all.

        Returns:
            Its file, such as `class-00012.png`.

        Raises:
            ValueError: the number is not that of a missing image.
            OSError: it could not be written.
        """
        if number not in self.missing:
            raise ValueError(f"number={number!r}: it is not one of the {len(self.missing)} images that {self.folder} lacks")
        path = _file(self.folder, number)
        write_atomically(path, as_png(image))
        return path


def class_images(folder: str | Path, wanted: int) -> ClassImages:
    """The images of a class in a folder, and which are missing until there are `wanted`.

    Images of all names count, so that users can bring their own. The missing ones have the lowest numbers of which there is
    no `class-00012.png`: after an interruption the same ones are made as without it.

    Args:
        folder: it need not be there yet.
        wanted: how many there are to be.

    Raises:
        ValueError: wanted is not a number from 1 up.
        NotADirectoryError: the folder is a file.
    """
    check_count("wanted", wanted)
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a folder of class images, got a file")
    there = list_images(folder).images if folder.is_dir() else ()
    count, taken = max(0, wanted - len(there)), set(there)
    free = [number for number in range(wanted) if _file(folder, number) not in taken]
    return ClassImages(folder, there, tuple(free[:count]))


def _file(folder: Path, number: int) -> Path:
    return folder / f"class-{number:05d}.png"
