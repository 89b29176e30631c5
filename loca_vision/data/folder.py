"""The user's own images in folders: which folders are parts, which are classes, and which other files lie there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path

from loca_vision.data.image_files import folders_in, list_images, relative_names
from loca_vision.data.images import TENTH, ImageFiles, ImageSet

NINTH = Fraction(1, 9)
PARTS = ("train", "validation", "test")
LAYOUT = "expected train/ and test/ with a folder for each class, or the classes' folders alone"
# Train, training, train_set, Training-Images, ...: the name of a part in any case, with or without a word for its content.
_PART = re.compile(
    r"((?P<train>train(ing)?)|(?P<validation>val(id(ation)?)?)|(?P<test>test(ing)?))[\s_.-]*(set|data|split|images|imgs)?",
    re.IGNORECASE,
)


def folder(root: Path, download: bool = False) -> ImageSet:
    """Read the user's own images: a folder for each class with any nesting below it, in the order of their names.

    `root` has a folder for each part, with the same classes in each; only the one for training is required. They are called
    `train`, `test` and `val`, or similar names such as `Training`, `test_set` and `valid`. Alternatively `root` contains the
    classes themselves. Parts without a folder are held out of the training images, as described in `ImageSet`.

    Raises:
        FileNotFoundError: a folder is missing, or a class has no image.
        ValueError: there are fewer than two classes, the parts have different classes, two folders could be one part, or the
            name of a class is not UTF-8.
    """
    parts = part_folders(root)
    if not parts:
        return _classes(root, root)
    if "train" not in parts:
        named = ", ".join(f"{path.name}/" for path in parts.values())
        raise FileNotFoundError(f"{root}: expected a folder train/ next to {named}, got none; {LAYOUT}")
    sets = {part: _classes(parts[part], root) for part in PARTS if part in parts}
    _check_same_classes(root, parts, sets)
    train, test, validation = (sets.get(part) for part in ("train", "test", "validation"))
    assert train is not None
    notes = (_parts_note(root, parts), *(note for images in sets.values() for note in images.notes), *_unread(root, parts))
    return ImageSet(
        train.train,
        train.classes,
        test.train if test else None,
        validation.train if validation else None,
        validation_share=TENTH if test else NINTH,  # of what is left when a tenth is held out for testing
        notes=notes,
    )


def test_part(root: Path) -> ImageSet | None:
    """Return the test part alone, as the `train` of a set; None if the root has no folder for it.

    Raises:
        FileNotFoundError, ValueError: as `folder`, about that part.
    """
    parts = part_folders(root)
    return _classes(parts["test"], root) if "test" in parts else None


def part_folders(root: Path) -> dict[str, Path]:
    """Return the folders of "train", "validation" and "test" in a root; none of them if it contains the classes themselves.

    Raises:
        FileNotFoundError: there is no such root.
        ValueError: two folders could be the same part.
    """
    check_folder(root)
    named = [(part, path) for path in folders_in(root) if (part := part_of(path.name))]
    if not any(folders_in(path) for _, path in named) and any(
        list_images(path).images for path in folders_in(root) if part_of(path.name) is None
    ):
        return {}  # a class may be called train, or valid
    parts: dict[str, Path] = {}
    for part, path in named:
        if part in parts:
            raise ValueError(
                f"{root}: expected one folder for the {part} images, got {parts[part].name}/ and {path.name}/; rename one"
            )
        parts[part] = path
    return {} if parts.keys() == {"validation"} else parts


def part_of(name: str) -> str | None:
    """Return the part that a folder's name stands for, if any."""
    match = _PART.fullmatch(name)
    return next(part for part, text in match.groupdict().items() if text) if match else None


def check_folder(path: Path) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: there is no such folder; {LAYOUT}")


def _classes(path: Path, root: Path) -> ImageSet:
    """Return the folders in a folder as classes, with all their images as the `train` of a set."""
    if not folders_in(path):
        raise FileNotFoundError(f"{path}: it has no folder; {LAYOUT}")
    listings = {entry.name: list_images(entry) for entry in folders_in(path)}
    # A folder in which everything is left out, such as runs/ with the output of training, is not a class.
    listings = {name: listing for name, listing in listings.items() if listing.images or not listing.left_out}
    for name in listings:
        _check_name(name, path)
    classes = tuple(sorted(listings))
    _check_classes(path, classes, [name for name in classes if not listings[name].images])
    files = [file for name in classes for file in listings[name].images]
    labels = [label for label, name in enumerate(classes) for _ in listings[name].images]
    return ImageSet(ImageFiles(files, labels, path), classes, validation_share=NINTH, notes=tuple(_notes(path, root)))


def _check_name(name: str, path: Path) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        shown = name.encode(errors="surrogateescape")
        raise ValueError(f"{path}: expected class names in UTF-8, got the folder {shown!r}; rename it") from None


def _check_classes(path: Path, classes: tuple[str, ...], empty: list[str]) -> None:
    if empty:
        raise FileNotFoundError(
            f"{path}: found no image for the classes {', '.join(empty)}; remove these folders, or put images there"
        )
    if not classes:
        raise FileNotFoundError(f"{path}: it has no folder with images; {LAYOUT}")
    if len(classes) < 2:
        raise ValueError(f"{path}: it has one class (folder), {classes[0]!r}; a classifier needs 2")
    hidden_parts = [name for name in classes if _is_like_a_part(path / name)]
    if len(hidden_parts) > 1:
        names = ", ".join(f"{name}/" for name in hidden_parts)
        raise ValueError(f"{path}: {names} look like parts with classes in them; call them train/, val/ and test/")


def _is_like_a_part(path: Path) -> bool:
    """Return whether it looks like a part, such as seg_train/: it contains folders and no files."""
    named = re.search("(?<![a-z])(train|test|val)", path.name, re.IGNORECASE)
    return named is not None and bool(folders_in(path)) and not any(entry.is_file() for entry in path.iterdir())


def _check_same_classes(root: Path, parts: Mapping[str, Path], sets: Mapping[str, ImageSet]) -> None:
    train = set(sets["train"].classes)
    for part, images in sets.items():
        differing = sorted(train ^ set(images.classes))
        if differing:
            raise ValueError(
                f"{root}: the class {differing[0]!r} is in only one of {parts['train'].name}/ and {parts[part].name}/"
            )


# What is said about the files


def _parts_note(root: Path, parts: Mapping[str, Path]) -> str:
    return "parts: " + ", ".join(f"{part} from {relative_names((parts[part],), root)}/" for part in PARTS if part in parts)


def _notes(path: Path, root: Path) -> Iterable[str]:
    listing = list_images(path)
    loose = [file for file in (*listing.images, *listing.others) if file.parent == path]
    others = tuple(sorted({*listing.others, *loose}))
    if others:
        yield f"not read, {len(others)} files that are not images of a class: {relative_names(others, root)}"
    if listing.left_out:
        yield f"left out, {len(listing.left_out)} hidden, of the system or of a run: {relative_names(listing.left_out, root)}"


def _unread(root: Path, parts: Mapping[str, Path]) -> Iterable[str]:
    """Yield a note about what lies next to the parts."""
    others = tuple(entry for entry in sorted(root.iterdir()) if entry not in parts.values())
    if others:
        yield f"not read, next to the parts: {relative_names(others, root)}"
