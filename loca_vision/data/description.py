"""How a set of images was understood, as lines for a terminal: parts, classes, counts, and what is not read."""

from __future__ import annotations

from collections import Counter

from loca_vision.data.images import ImageSplits

_MOST_CLASSES = 20  # more are not counted one by one


def described(splits: ImageSplits) -> str:
    """Return the sizes and origins of the parts, the classes with their training images, and all notes."""
    sizes = {"training": splits.train, "validation": splits.validation, "testing": splits.test}
    rules = {"training": "", "validation": _rule(splits, "validation"), "testing": _rule(splits, "test")}
    parts = ", ".join(f"{len(images)} for {part}{rules[part]}" for part, images in sizes.items())
    return "\n".join((f"images: {parts}", f"classes: {_classes(splits)}", *splits.notes))


def _rule(splits: ImageSplits, part: str) -> str:
    rule = splits.protocol[part]
    return "" if rule == "published" else f" ({rule})"


def _classes(splits: ImageSplits) -> str:
    counts = Counter(splits.train.labels)
    if len(splits.classes) <= _MOST_CLASSES:
        return ", ".join(f"{name} ({counts[label]})" for label, name in enumerate(splits.classes))
    every = [counts[label] for label in range(len(splits.classes))]
    return f"{len(splits.classes)}, each with {min(every)} to {max(every)} images for training"
