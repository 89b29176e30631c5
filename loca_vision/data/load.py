"""Image sets for classification: `load(name, root)` returns untransformed images in three parts, by FourierFT's protocol."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from loca_vision.data.catalogue import SETS, Entry
from loca_vision.data.hub import HUB, hub_copy
from loca_vision.data.images import Images, ImageSet, ImageSplits, Part, hold_out
from loca_vision.data.same_images import files_of
from loca_vision.messages import one_line

Source = Literal["torchvision", "hub"]
NAMES: tuple[str, ...] = tuple(SETS)
EVERYWHERE = ("digits",)  # sets that are installed with a library


def load(
    name: str, root: str | Path | None, *, source: Source = "torchvision", seed: int = 0, download: bool = False
) -> ImageSplits:
    """Load the training, validation and test part of a set; the same set, source and seed always give the same parts.

    A part that the authors did not provide is held out at random: a tenth for validation; for testing, a fifth of DTD (ignoring
    its published partitions) and a fifth of EuroSAT, whose validation part is also a fifth of all images.

    Args:
        name: one of `NAMES`.
        root: where the files are, as torchvision lays them out; with the hub, its cache, or None for the default one.
            The digits need none.
        source: files under the root, or the set's copy on the hub.
        download: first download what is not under the root, if torchvision can.

    Raises:
        ValueError: the name or source is unknown, or the files are not as published.
        FileNotFoundError: files are missing; the error says which, and where to get them.
        OSError: the download failed.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed={seed!r}: expected a whole number from 0 up")
    published = read(name, root, source=source, download=download)
    train, test, test_rule = held_out(published.train, published.test, published.test_share, seed)
    train, validation, validation_rule = held_out(train, published.validation, published.validation_share, seed)
    protocol: dict[str, Any] = {
        "dataset": name,
        "source": source,
        "repositories": list(HUB[name].repositories) if source == "hub" else [],
        "seed": seed,
        "sizes": {"train": len(train), "validation": len(validation), "test": len(test)},
        "test": test_rule,
        "validation": validation_rule,
        "augment": SETS[name].augment,
        "files": files_of(published),
    }
    entry = SETS[name]
    return ImageSplits(train, validation, test, published.classes, entry.licence, entry.augment, protocol, published.notes)


def read(name: str, root: str | Path | None, *, source: Source = "torchvision", download: bool = False) -> ImageSet:
    """Read a set as it was published, with nothing held out; arguments and errors are those of `load`."""
    if name not in SETS:
        raise ValueError(f"dataset={name!r}: the sets are {', '.join(NAMES)}")
    if source not in ("torchvision", "hub"):
        raise ValueError(f"source={source!r}: the choices are 'torchvision' and 'hub'")
    if source == "hub":
        return hub_copy(name, Path(root).expanduser() if root else None)
    if root is None and name not in EVERYWHERE:
        raise ValueError(f"root=None: say in which folder {SETS[name].title} lies")
    return _read(SETS[name], Path(root or "").expanduser(), download)


def held_out(images: Images, part: Images | None, share: Fraction, seed: int) -> tuple[Images, Images, str]:
    """Return the remaining images, the published part or else a share of them, and a sentence about where that is from."""
    if part is not None:
        return images, part, "published"
    kept, held = hold_out(len(images), share, seed)
    return Part(images, kept), Part(images, held), f"{share} of {len(images)}, drawn by the seed"


def _read(entry: Entry, root: Path, download: bool) -> ImageSet:
    fetch = download and entry.downloads
    if not fetch:
        for path in (root / name for name in entry.needs):
            if not path.exists():
                raise FileNotFoundError(f"{path}: {entry.title} is not there; {entry.get.format(root=root)}")
    elif root.exists() and not root.is_dir():
        raise ValueError(f"root={str(root)!r}: a file is in the place of that folder")
    if not entry.needs:
        return entry.read(root, False)
    try:
        return _whole(entry.read(root, fetch))
    except OSError as error:
        raise OSError(f"{root}: {entry.title} cannot be {'downloaded' if fetch else 'read'} ({one_line(error)})") from error
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # torchvision, scipy and pickle can raise anything for unexpected files
        raise ValueError(
            f"{root}: the files of {entry.title} are not as published ({type(error).__name__}: {one_line(error)})"
        ) from error


def _whole(images: ImageSet) -> ImageSet:
    for part in (images.train, images.test, images.validation):
        if part is not None and not len(part):
            raise ValueError("a part has no image")
    return images
