"""Image sets for classification: `load(name, root)` gives raw images in three parts, by FourierFT's protocol."""

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
    """The training, validation and test part of a set: the same ones whenever set, source and seed are.

    A part that the authors left out is held out at random: for validation a tenth, and for testing a fifth of DTD
    (whatever its published partitions) and of EuroSAT, of which validation is a fifth of all, too.

    Args:
        name: one of `NAMES`.
        root: where the files are, as torchvision lays them out; with the hub, its cache, or None for the usual one.
            The digits need none.
        source: files under the root, or the set's copy on the hub.
        download: first fetch what is not under the root, where torchvision can.

    Raises:
        ValueError: an unknown name or source, or files that are not as published.
        FileNotFoundError: files are missing; the sentence says which, and where to get them.
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
    """A set as it was published, nothing held out; arguments and errors are those of `load`."""
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
    """What stays of the images, the published part or else a share of them, and a sentence about where that is from."""
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
    except Exception as error:  # whatever torchvision, scipy and pickle raise at files that are not what they expect
        raise ValueError(
            f"{root}: the files of {entry.title} are not as published ({type(error).__name__}: {one_line(error)})"
        ) from error


def _whole(images: ImageSet) -> ImageSet:
    for part in (images.train, images.test, images.validation):
        if part is not None and not len(part):
            raise ValueError("a part has no image")
    return images
