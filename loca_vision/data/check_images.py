"""Read every image once before a long run, so that a broken one is found before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from loca_vision.data.images import ImageArrays, Images, Part

_AT_ONCE = 256  # images handed to the threads at a time


def check_images(images: Sequence[Images], *, progress: bool = True) -> None:
    """Read the images of all parts; those in memory need no check.

    Raises:
        ValueError: some cannot be read; the error names the first of them and says why.
    """
    parts = [part for part in images if not isinstance(_source(part), ImageArrays)]
    places = [(part, index) for part in parts for index in range(len(part))]
    check_readable(lambda number: places[number][0][places[number][1]], len(places), "images", progress=progress)


def check_readable(read: Callable[[int], Any], count: int, what: str, *, progress: bool = True) -> None:
    """Call `read` with 0 to count - 1, in threads, since image decoders release Python's global lock.

    Args:
        read: raises OSError or ValueError with a sentence for what it cannot read.
        what: what is read, in the plural.

    Raises:
        ValueError: some cannot be read; the error names the first of them and says why.
    """
    faults: list[str] = []
    with tqdm(total=count, desc=f"checking {what}", dynamic_ncols=True, disable=None if progress and count else True) as bar:
        for fault in _faults(read, count):
            bar.update()
            faults += [fault] if fault else []
    if len(faults) == 1:
        raise ValueError(faults[0])
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise ValueError(f"{len(faults)} of {count} {what} cannot be read: {'; '.join(faults[:3])}{more}")


def _faults(read: Callable[[int], Any], count: int) -> Iterator[str]:
    """Yield what is wrong with each, in order; an empty text if nothing is."""

    def fault(number: int) -> str:
        try:
            read(number)
        except (OSError, ValueError) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        for start in range(0, count, _AT_ONCE):
            yield from threads.map(fault, range(start, min(count, start + _AT_ONCE)))


def _source(images: Images) -> Images:
    return _source(images.images) if isinstance(images, Part) else images
