"""The images that a trained classifier is tested on, with the class indices of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loca_vision.data.folder import test_part
from loca_vision.data.images import Images, Relabelled, first
from loca_vision.data.same_images import by_class, class_differences, differences
from loca_vision.recipes.classification.recipe import Recipe
from loca_vision.recipes.classification.task import splits_of


@dataclass(frozen=True)
class ImagesToTest:
    """Untransformed images with a run's class indices, and sentences about how they differ from those the run was tested on."""

    images: Images
    protocol: dict[str, Any]
    notes: tuple[str, ...]


def images_to_test(recipe: Recipe, metrics: Mapping[str, Any]) -> ImagesToTest:
    """Return the recipe's test images; for a folder only its test part, if it has one.

    Args:
        recipe: the recipe of the run, with the current place of the images.
        metrics: the metrics of the run.

    Raises:
        FileNotFoundError, OSError: images are missing.
        ValueError: their classes are not those of the run; or the test images are drawn from images that have changed, so
            that some of them may have been trained on.
    """
    alone = test_part(Path(recipe.root).expanduser()) if recipe.dataset == "folder" and recipe.root else None
    if alone is not None:
        images = first(alone.train, recipe.test_images or len(alone.train), recipe.split_seed)
        files, rule = {"test": by_class(alone.train, alone.classes)}, "published"
        classes, notes = alone.classes, alone.notes
    else:
        splits = splits_of(recipe)
        images, files, rule = splits.test, splits.protocol["files"], splits.protocol["test"]
        classes, notes = splits.classes, splits.notes
    own = metrics["classes"]
    _check_classes(recipe, own, classes)
    changes = _changes(metrics["protocol"].get("files"), files, own)
    if changes and rule != "published":
        raise ValueError(
            f"root={str(recipe.root)!r}: the images are not those of the run ({changes}), so the test images that are drawn "
            "from them may have been trained on; put the folders of the classes into a folder test/, and give the one above"
        )
    said = (f"these are not the test images of the run: {changes}",) if changes else ()
    protocol = {"dataset": recipe.dataset, "test": rule, "sizes": {"test": len(images)}, "files": files}
    return ImagesToTest(Relabelled(images, [own.index(name) for name in classes]), protocol, (*notes, *said))


def _check_classes(recipe: Recipe, own: Sequence[str], classes: Sequence[str]) -> None:
    changes = class_differences(sorted(own), sorted(classes))
    if changes:
        raise ValueError(f"root={str(recipe.root)!r}: the images must have the classes that the model learned, got {changes}")


def _changes(before: Mapping[str, Any] | None, now: Mapping[str, Any], classes: Sequence[str]) -> str:
    """Return how the relevant files differ: those of the test part or, if that is drawn, all files."""
    if before is None:  # an earlier version wrote the run
        return ""
    if "test" in now:
        before, now = {"test": before.get("test", {})}, {"test": now["test"]}
    return differences({"classes": classes, "files": before}, {"classes": classes, "files": now})
