"""Check that a run's images are still the ones it began with: the classes, and a digest of their files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any

from loca_vision.data.images import Images, ImageSet, ImageSplits

Files = dict[str, dict[str, str]]
"""By part and class: how many images, and a digest of their names and sizes, as in "12 3b2a...". """


def files_of(images: ImageSet) -> Files:
    """Return the files of a set's published parts, before anything is held out."""
    parts = {"train": images.train, "validation": images.validation, "test": images.test}
    return {part: by_class(part_images, images.classes) for part, part_images in parts.items() if part_images is not None}


def by_class(images: Images, classes: Sequence[str]) -> dict[str, str]:
    """Return, for each class, the number of images and a digest of their identities, in order."""
    digests, counts = [sha256() for _ in classes], [0] * len(classes)
    for index, label in enumerate(images.labels):
        digests[label].update(images.identity(index) + b"\n")
        counts[label] += 1
    return {name: f"{counts[i]} {digests[i].hexdigest()[:16]}" for i, name in enumerate(classes)}


def images_in(splits: ImageSplits) -> dict[str, Any]:
    """Return what a run records to recognise its images: classes and files."""
    return {"classes": list(splits.classes), "files": splits.protocol["files"]}


def check_same_images(place: object, before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> None:
    """Refuse to continue a run with other images than it began with.

    Args:
        place: what the run left behind, for the error message.
        before, now: results of `images_in`; None if an earlier version wrote the run, which recorded nothing.

    Raises:
        ValueError: they differ; the error says how.
    """
    changes = differences(before, now) if before else ""
    if changes:
        raise ValueError(
            f"{place}: the run there began with other images: {changes}; put the images back, or start a new run in another "
            "folder"
        )


def class_differences(before: Sequence[str], now: Sequence[str]) -> str:
    """Return how the classes differ, as the end of a sentence; empty if they are the same in the same order."""
    gone, new = ([repr(name) for name in one if name not in set(other)] for one, other in ((before, now), (now, before)))
    changes = [f"{_some(gone)} missing"] if gone else []
    changes += [f"{_some(new)} new"] if new else []
    if not changes and list(before) != list(now):
        changes = [f"they are in the order {_some(now)}, before it was {_some(before)}"]
    return " and ".join(changes)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return how the images differ from the earlier ones, as the end of a sentence; empty if they are the same.

    Args:
        before, now: mappings with "classes" and "files".
    """
    changes = class_differences(before["classes"], now["classes"])
    if changes:
        return f"the classes differ: {changes}"
    changed_files = list(_changed_files(before["files"], now["files"]))
    more = f", and {len(changed_files) - 3} more" if len(changed_files) > 3 else ""
    return "; ".join(changed_files[:3]) + more


def _changed_files(before: Files, now: Files) -> Iterator[str]:
    if before.keys() != now.keys():
        yield f"the parts are {', '.join(now)}, before they were {', '.join(before)}"
    for part in now.keys() & before.keys():
        for name, digest in now[part].items():
            old = before[part].get(name, "0 ")
            count, count_before = digest.split()[0], old.split()[0]
            if count != count_before:
                yield f"{part} has {count} images of {name!r}, before it had {count_before}"
            elif digest != old:
                yield f"{part} has other images of {name!r} than before (names or sizes of files)"


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
