"""The adapters that are compared, and their training by runs of `loca-vision train-image`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from loca_vision.data.images import as_png
from loca_vision.methods.by_name import title_of
from loca_vision.recipes.reports.metrics import METRICS
from loca_vision.storage.atomic_file import write_atomically
from subject_study.objects import KINDS
from subject_study.scenes import CLASS, COLOURS, PLACES, SUBJECT, Scene, in_style, subject_scene

Task = Literal["subject", "style"]
SHOWN_PLACES = ("on a white background", "on a blue background", "in a meadow", "in the snow")  # with the subject
SHOWN_KINDS = ("fish", "cup", "house", "mushroom")  # in the style
SUBJECT_POSES, STYLE_POSES, HELD_POSES = 1_000, 2_000, 3_000  # first seeds of the poses of drawings
SHOWN = 8  # training drawings of the subject, and also of the style


@dataclass(frozen=True)
class Arm:
    """One adapter.

    Args:
        task: what the adapter is trained on.
        method: a name for `loca-vision train-image --method`.
        size: the number of coefficients per projection, or the rank.
        rate: the learning rate.
        prior: whether it is also trained on the base's pictures of the subject's class (prior preservation).
    """

    task: Task
    method: str
    size: int
    rate: float
    prior: bool = False

    @property
    def name(self) -> str:
        """The name of the adapter's folder."""
        return f"{self.task}-{self.method}-{self.size}" + ("-prior" if self.prior else "")

    @property
    def title(self) -> str:
        """The name for tables and plots."""
        return f"{title_of(self.method)}, r = {self.size}" if self.by_rank else title_of(self.method)

    @property
    def by_rank(self) -> bool:
        """Whether the size is a rank."""
        return self.method in ("lora", "selora")


@dataclass(frozen=True)
class Training:
    """The training settings that all adapters share.

    Args:
        folder: the folder of the study, with the base in base/ and drawings in drawings/.
        steps: optimiser steps.
        resolution: pixels per side.
        class_images: the number of images that the base draws for prior preservation.
        num_inference_steps: denoising steps of the class images.
        guidance_scale: guidance scale of the class images.
        seed: the seed of all random numbers.
        jobs: how many adapters are trained at the same time; if several, each with one thread.
    """

    folder: Path
    steps: int
    resolution: int
    class_images: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    jobs: int = 1

    def adapter(self, arm: Arm, into: str = "adapters", seed: int | None = None) -> Path:
        """Train the adapter if it is missing, and return its folder.

        Raises:
            ValueError: training failed.
        """
        out = self.folder / into / arm.name
        if not (out / METRICS).exists():
            told = self._common(arm) | self._images(arm) | self._method(arm)
            told |= {"output_dir": out, "seed": self.seed if seed is None else seed}
            switches = ["--center_crop", "--random_flip"]
            if arm.prior:
                switches.append("--with_prior_preservation")
            _run([*switches, *(word for name, value in told.items() for word in (f"--{name}", str(value)))], self.jobs > 1)
        return out

    def adapters(self, arms: Sequence[Arm], into: str = "adapters", seed: int | None = None) -> list[Path]:
        """Train the missing adapters, `jobs` of them at a time, and return the folders of all.

        Raises:
            ValueError: training failed. The trainings already running finish first, and no others are started.
        """
        if self.jobs == 1:
            return [self.adapter(arm, into, seed) for arm in arms]
        with ThreadPoolExecutor(self.jobs) as pool:
            work = [pool.submit(self.adapter, arm, into, seed) for arm in arms]
            bar = tqdm(work, desc=into, dynamic_ncols=True, disable=None)
            try:
                return [one.result() for one in bar]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _common(self, arm: Arm) -> dict[str, Any]:
        return {
            "pretrained_model_name_or_path": self.folder / "base",
            "resolution": self.resolution,
            "train_batch_size": 4,
            "max_train_steps": self.steps,
            "learning_rate": arm.rate,
            "lr_scheduler": "cosine",
            "lr_warmup_steps": 0,
            "cache_dir": self.folder / "cache",
            "mixed_precision": "no",
            "adapter_dtype": "float16",
            "checkpointing_steps": 100,
            "checkpoints_total_limit": 1,
            "resume_from_checkpoint": "latest",
            "report_to": "none",
        }

    def _images(self, arm: Arm) -> dict[str, Any]:
        drawings = self.folder / "drawings" / arm.task
        if arm.task == "style":
            return {"train_data_dir": drawings}
        told: dict[str, Any] = {"instance_data_dir": drawings, "instance_prompt": SUBJECT}
        if arm.prior:
            told |= {"class_prompt": CLASS, "class_data_dir": self.folder / "class", "num_class_images": self.class_images}
            told |= {"sample_batch_size": 16, "validation_inference_steps": self.num_inference_steps}
            told |= {"validation_guidance_scale": self.guidance_scale}
        return told

    def _method(self, arm: Arm) -> dict[str, Any]:
        told: dict[str, Any] = {"method": arm.method, "rank" if arm.by_rank else "n_components": arm.size}
        return told | ({"learning_steps": self.steps // 2} if arm.method == "loca" else {})


def _run(arguments: list[str], beside_others: bool) -> None:
    """Run the installed trainer in its own process. Its output is shown; with `beside_others`, only if it fails.

    Raises:
        ValueError: the trainer failed.
    """
    name = Path(arguments[arguments.index("--output_dir") + 1]).name
    command = [sys.executable, "-m", "loca_vision.commands.train_image", *arguments]
    kept: dict[str, Any] = {}
    if beside_others:
        kept = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    else:
        print(f"train-image: {name}", flush=True)
    done = subprocess.run(command, check=False, text=True, **kept)
    if done.returncode:
        print(done.stdout or "", end="", file=sys.stderr)
        raise ValueError(f"train-image: {name} ended with status {done.returncode}; what it said is above")


# Drawings


def subject_drawings() -> list[Scene]:
    """Return the eight training drawings of the subject: two in each of four places."""
    places = [SHOWN_PLACES[number % len(SHOWN_PLACES)] for number in range(SHOWN)]
    return [subject_scene(place, SUBJECT_POSES + number) for number, place in enumerate(places)]


def style_drawings() -> list[Scene]:
    """Return the eight training drawings of the style: two of each of four kinds."""
    return [_in_neon(number, SHOWN_KINDS, STYLE_POSES) for number in range(SHOWN)]


def held_subjects(place: str, count: int) -> list[Scene]:
    """Return drawings of the subject in one place that no adapter is trained on."""
    first = HELD_POSES + 100 * PLACES.index(place)
    return [subject_scene(place, first + number) for number in range(count)]


def style_scenes(count: int) -> list[Scene]:
    """Return scenes in the style, with kinds and poses that no adapter has seen in it."""
    unseen = [kind for kind in KINDS if kind not in SHOWN_KINDS]
    return [_in_neon(number, unseen, HELD_POSES) for number in range(count)]


def _in_neon(number: int, kinds: Iterable[str], poses: int) -> Scene:
    """Return the scene in neon with this number: the kinds take turns, and the number determines the colour."""
    choices, colours = tuple(kinds), tuple(COLOURS)
    scene = Scene(choices[number % len(choices)], colours[(number + number // len(choices)) % len(colours)], PLACES[0])
    return in_style(Scene(scene.kind, scene.colour, scene.place, pose=poses + number))


def write_drawings(folder: Path, size: int) -> None:
    """Write the training drawings to folder/subject and folder/style, those of the style with captions."""
    for number, scene in enumerate(subject_drawings()):
        write_atomically(folder / "subject" / f"{number}.png", as_png(scene.picture(size)))
    for number, scene in enumerate(style_drawings()):
        write_atomically(folder / "style" / f"{number}.png", as_png(scene.picture(size)))
        write_atomically(folder / "style" / f"{number}.txt", scene.caption(place=False).encode())
