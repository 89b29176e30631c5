"""Images of a class, for DreamBooth's prior preservation: which exist, which are missing, and how new ones are stored."""

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
        folder: the folder of the images.
        there: the existing images, with any name and at any depth, in the order of their paths.
        missing: the numbers of the images still to be made, in order; none if `there` has at least as many as wanted.
    """

    folder: Path
    there: tuple[Path, ...]
    missing: tuple[int, ...]

    def write(self, number: int, image: Image.Image) -> Path:
        """Store a generated image, either completely or not at all.

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
    """Return the images of a class in a folder, and which are missing until there are `wanted`.

    Images of any name count, so that users can bring their own. The missing ones have the lowest numbers for which there is no
    file like `class-00012.png`, so after an interruption the same images are made as without one.

    Args:
        folder: it need not exist yet.
        wanted: how many images there should be.

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
