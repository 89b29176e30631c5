"""Draw pictures with adapters and measure their likeness to held-out drawings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from PIL import Image

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from loca_vision.data.sampling import stream_seed
from loca_vision.recipes.diffusion.drawing import Picture, pictures
from subject_study.arms import SHOWN_PLACES, Task, held_subjects, style_scenes
from subject_study.likeness import MARKS, Eye, Seen, seen
from subject_study.scenes import CLASS, PLACES, SUBJECT, Scene

_PICTURE = 71  # the key of the random number stream
STYLE_PROMPTS = 8


@dataclass(frozen=True)
class Studio:
    """The base and the settings for drawing pictures with it.

    Args:
        pipe: the base, into which adapters are loaded temporarily.
        eye: the network that evaluates the pictures.
        how: sizes, steps and guidance.
        count: pictures per prompt.
        seed: the seed of the noise.
    """

    pipe: Any
    eye: Eye
    how: Picture
    count: int
    seed: int

    @contextmanager
    def adapted(self, folder: Path | None) -> Iterator[None]:
        """Load an adapter, or none, within a context."""
        if folder is not None:
            self.pipe.load_loca_weights(folder)
        try:
            yield
        finally:
            if folder is not None:
                self.pipe.unload_loca_weights()

    @cached_property
    def _drawn_before(self) -> dict[tuple[str, ...], list[list[Image.Image]]]:
        return {}

    def of_base(self, prompts: Sequence[str]) -> list[list[Image.Image]]:
        """Return the base's pictures, which are drawn once for all adapters."""
        if tuple(prompts) not in self._drawn_before:
            self._drawn_before[tuple(prompts)] = self.draw(prompts, scale=0)
        return self._drawn_before[tuple(prompts)]

    def draw(self, prompts: Sequence[str], scale: float = 1.0) -> list[list[Image.Image]]:
        """Draw `count` pictures for each prompt in one batch, with the same seeds for every adapter and every prompt."""
        numbers = range(self.count)
        drawn = self.draw_one([prompt for prompt in prompts for _ in numbers], [*numbers] * len(prompts), scale)
        return [drawn[start : start + self.count] for start in range(0, len(drawn), self.count)]

    def draw_one(self, prompts: Sequence[str], numbers: Sequence[int], scale: float = 1.0) -> list[Image.Image]:
        """Draw a picture for each prompt, with the noise determined by the corresponding number."""
        seeds = [stream_seed(self.seed, number, _PICTURE) for number in numbers]
        return pictures(self.pipe, list(prompts), seeds, self.how, scale=scale)

    def look(self, scenes: Sequence[Scene]) -> Seen:
        """Evaluate drawings of scenes."""
        return seen(self.eye, [scene.picture(self.how.width) for scene in scenes])


def measured(studio: Studio, task: Task, folder: Path | None) -> dict[str, float]:
    """Measure one adapter, or the base alone."""
    with studio.adapted(folder):
        return subject_measures(studio) if task == "subject" else style_measures(studio)


def subject_measures(studio: Studio) -> dict[str, float]:
    """Measure pictures of the subject and of its class in all places.

    Returns:
        likeness: mean cosine to drawings of the subject in the same place, -1 to 1.
        marks: share of stripes, crown, single eye and orange body that are recognised when the prompt names the subject.
        new_places: share of correct places, among the places in which the subject was never shown.
        class_marks: the same as marks when the prompt names only the class; it should stay as in the base.
        class_change: mean absolute pixel difference from the base's pictures of the class, 0 to 255.
    """
    of = [seen(studio.eye, drawn) for drawn in studio.draw([f"{SUBJECT} {place}" for place in PLACES])]
    held = [studio.look(held_subjects(place, studio.count)) for place in PLACES]
    prompts = [f"{CLASS} {place}" for place in PLACES]
    classes, before = studio.draw(prompts), studio.of_base(prompts)
    new = [one.share("place", place) for one, place in zip(of, PLACES, strict=True) if place not in SHOWN_PLACES]
    return {
        "likeness": fmean(one.likeness(other) for one, other in zip(of, held, strict=True)),
        "marks": fmean(marks_of(one) for one in of),
        "new_places": fmean(new),
        "class_marks": fmean(marks_of(seen(studio.eye, drawn)) for drawn in classes),
        "class_change": fmean(_apart(one, other) for one, other in zip(classes, before, strict=True)),
    }


def style_measures(studio: Studio) -> dict[str, float]:
    """Measure pictures in the style, of kinds that were never shown in it, and pictures from prompts without the style.

    Returns:
        likeness: mean cosine to drawings of the same kind and colour in the style, -1 to 1.
        neon: share of pictures that are recognised as neon.
        kinds: share of correct kinds.
        plain_neon: share of neon pictures when the prompt does not ask for it.
        plain_change: mean absolute pixel difference from the base's pictures of those prompts, 0 to 255.
    """
    scenes = style_scenes(STYLE_PROMPTS)
    of = [seen(studio.eye, drawn) for drawn in studio.draw([scene.caption(place=False) for scene in scenes])]
    held = [studio.look(_other_poses(scene, studio.count)) for scene in scenes]
    prompts = [f"a {scene.colour} {scene.kind} {place}" for scene, place in zip(scenes, PLACES, strict=True)]
    plain, before = studio.draw(prompts), studio.of_base(prompts)
    return {
        "likeness": fmean(one.likeness(other) for one, other in zip(of, held, strict=True)),
        "neon": fmean(one.share("style", "neon") for one in of),
        "kinds": fmean(one.share("kind", scene.kind) for one, scene in zip(of, scenes, strict=True)),
        "plain_neon": fmean(seen(studio.eye, drawn).share("style", "neon") for drawn in plain),
        "plain_change": fmean(_apart(one, other) for one, other in zip(plain, before, strict=True)),
    }


def ceiling(studio: Studio, task: Task) -> float:
    """Return the likeness between different drawings of the same thing, which a perfect adapter would reach."""
    if task == "subject":
        pairs = [(held_subjects(place, 2 * studio.count)) for place in PLACES]
    else:
        pairs = [_other_poses(scene, 2 * studio.count) for scene in style_scenes(STYLE_PROMPTS)]
    return fmean(studio.look(one[: studio.count]).likeness(studio.look(one[studio.count :])) for one in pairs)


def prompts_followed(studio: Studio, scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the base's shares of correct kinds, colours, places and numbers, with one picture per caption."""
    drawn = studio.draw_one([scene.caption() for scene in scenes], range(len(scenes)), scale=0)
    found = [seen(studio.eye, [picture]) for picture in drawn]
    names = ("kind", "colour", "place", "two")
    return {
        name: fmean(one.share(name, getattr(scene, name)) for one, scene in zip(found, scenes, strict=True)) for name in names
    }


def marks_of(one: Seen) -> float:
    """Return the mean share of the subject's four marks."""
    return fmean([*(one.share(mark, True) for mark in MARKS), one.share("colour", "orange")])


def _other_poses(scene: Scene, count: int) -> list[Scene]:
    return [replace(scene, pose=scene.pose + 1000 * (number + 1)) for number in range(count)]


def _apart(some: Sequence[Image.Image], others: Sequence[Image.Image]) -> float:
    pairs = zip(some, others, strict=True)
    return fmean(float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean()) for one, other in pairs)
