"""The whole study: drawings, base, measuring network, adapters, results."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import tyro
from diffusers import StableDiffusionPipeline

from loca_vision.checks import check_count
from loca_vision.data.images import as_png
from loca_vision.methods.registry import config_class
from loca_vision.recipes.diffusion.drawing import Picture
from loca_vision.recipes.reports.environment import environment
from loca_vision.recipes.reports.metrics import read_metrics
from loca_vision.recipes.settings.console import run_command
from loca_vision.storage.atomic_file import write_atomically
from loca_vision.storage.output_folder import claim
from loca_vision.storage.safetensors_file import open_safetensors, write_safetensors
from loca_vision.storage.strict_json import read_json
from subject_study.arms import Arm, Task, Training, write_drawings
from subject_study.base import BaseSettings, drawn_scenes, trained_base
from subject_study.likeness import DRAWINGS, Eye, accuracies, trained_eye
from subject_study.measures import Studio, ceiling, measured, prompts_followed
from subject_study.report import Result, as_json, class_sheet, draw_numbers, scales_sheet, table
from subject_study.tuning import best_rates

PROG = "study.py"
RATES = {"loca": 0.2, "fourierft": 0.2, "sdctft": 0.2, "waveft": 8e-3, "shira": 0.2, "lora": 1e-2, "selora": 1e-2}
TASKS: tuple[Task, ...] = ("subject", "style")
_NOT_OF_RESULTS = ("output", "jobs")


@dataclass(frozen=True)
class Study:
    """Train a small pipeline that draws, teach it a subject and a style with adapters, and measure them."""

    output: Annotated[Path, tyro.conf.Positional]
    """Output folder: results.json, study.md, numbers.png, scales.png, class.png, and a folder for each step."""
    methods: tuple[str, ...] = ("loca", "fourierft", "waveft", "lora")
    """Methods to compare."""
    n_components: tuple[int, ...] = (5, 20, 80)
    """Numbers of components per projection, for methods that have them."""
    ranks: tuple[int, ...] = (1, 4)
    """Ranks, for the other methods."""
    steps: int = 400
    """Optimiser steps of every adapter, with 4 drawings each, and 4 more of the class with prior preservation."""
    class_images: int = 32
    """Number of images that the base draws for prior preservation."""
    resolution: int = 40
    """Pixels per side."""
    channels: tuple[int, ...] = (32, 64, 128)
    """Channels of the base UNet's levels."""
    drawings: int = 10000
    """Number of drawings that the base is trained on."""
    base_steps: int = 9000
    """Optimiser steps of the base's UNet and text encoder."""
    autoencoder_steps: int = 300
    """Optimiser steps of the base's autoencoder."""
    batch_size: int = 16
    """Drawings per step of the base."""
    learning_rate: float = 1e-3
    """Highest learning rate of the base's UNet and text encoder."""
    likeness_steps: int = 900
    """Optimiser steps of the measuring network."""
    pictures: int = 4
    """Number of measured pictures per prompt."""
    num_inference_steps: int = 20
    """Denoising steps of every picture."""
    guidance_scale: float = 3.0
    """Guidance scale of every picture."""
    seed: int = 0
    """Seed of all random draws."""
    jobs: int = 2
    """How many adapters are trained at the same time; if several, each with one thread."""
    rate_factors: tuple[float, ...] = (0.3, 1.0, 3.0)
    """Factors on every method's own rate. With several, each adapter is trained at all of them, with a different seed, and the
    rate with the largest likeness is used."""

    @property
    def base(self) -> BaseSettings:
        """The settings that the base depends on."""
        same = ("resolution", "channels", "drawings", "autoencoder_steps", "batch_size", "learning_rate", "seed")
        return BaseSettings(steps=self.base_steps, **{name: getattr(self, name) for name in same})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the missing parts of the study and return the exit status."""
    return run_command(PROG, Study, run, arguments, extra="train,diffusers")


def run(study: Study) -> None:
    """Run all steps, then write the results: results.json, study.md and pictures.

    Raises:
        ValueError: a setting is out of range or differs from the one the folder was started with, or a step failed.
    """
    _check(study)
    told = {name: value for name, value in asdict(study).items() if name not in _NOT_OF_RESULTS}
    about = json.loads(json.dumps(told | {"rates": {method: RATES[method] for method in study.methods}}))
    claim(study.output, "settings.json", about, "results")
    Steps(study, about).results()


def _check(study: Study) -> None:
    names = ("steps", "class_images", "base_steps", "autoencoder_steps", "batch_size", "likeness_steps", "pictures", "jobs")
    for name in (*names, "num_inference_steps"):
        check_count(name, getattr(study, name))
    check_count("drawings", study.drawings, 64)
    if not study.methods or len(set(study.methods)) < len(study.methods):
        raise ValueError(f"methods={list(study.methods)}: at least one, and none twice")
    for method in study.methods:
        config_class(method)
        if method not in RATES:
            raise ValueError(f"methods={method!r}: the study has a rate for {', '.join(RATES)}")
    for name in ("n_components", "ranks"):
        sizes = getattr(study, name)
        if not sizes or any(size < 1 for size in sizes) or len(set(sizes)) < len(sizes):
            raise ValueError(f"{name}={list(sizes)}: one or more different whole numbers from 1 up")
    if not study.rate_factors or min(study.rate_factors) <= 0 or not all(map(math.isfinite, study.rate_factors)):
        raise ValueError(f"rate_factors={list(study.rate_factors)}: one or more numbers above 0")
    check_count("seed", study.seed, 0)
    study.base.check()
    Picture(study.resolution, study.resolution, study.num_inference_steps, study.guidance_scale)


@dataclass(frozen=True)
class Steps:
    """The steps of a study, each in its own folder."""

    study: Study
    about: dict[str, Any]

    def results(self) -> None:
        """Run everything that is missing, then write the table, the pictures and the record."""
        folder = self.study.output
        self.base()
        self.training.adapters([arm for task in TASKS for arm in self.arms[task]])
        found = {task: [self._measured(task, arm) for arm in (None, *self.arms[task])] for task in TASKS}
        ceilings = {task: ceiling(self.studio, task) for task in TASKS}
        self._pictures()
        draw_numbers(folder / "numbers.png", found, ceilings)
        said = "\n".join(table(task, found[task]) for task in TASKS)
        write_atomically(folder / "study.md", said.encode())
        record: dict[str, Any] = {
            "settings": self.about,
            "base": self._base_measures(),
            "ceilings": ceilings,
            **{task: [as_json(one) for one in found[task]] for task in TASKS},
            "environment": environment(),
        }
        write_atomically(folder / "results.json", (json.dumps(record, indent=1) + "\n").encode())
        print(said)

    def base(self) -> None:
        """Train the pipeline, in base/, and write the training drawings of the adapters, in drawings/."""
        of, out = self.study, self.study.output / "base"
        if not (out / "model_index.json").exists():
            trained_base(of.base, of.output / "checkpoints", self.about).save_pretrained(out)
        write_drawings(of.output / "drawings", of.resolution)

    @cached_property
    def studio(self) -> Studio:
        """The base with the measuring network, which is trained if it is missing."""
        of, file = self.study, self.study.output / "likeness.safetensors"
        pipe = StableDiffusionPipeline.from_pretrained(of.output / "base", safety_checker=None)
        if file.exists():
            with open_safetensors(file) as opened:
                eye = Eye.holding(opened.tensors())
        else:
            eye = trained_eye(pipe.vae, of.resolution, min(of.drawings, DRAWINGS), of.likeness_steps, of.seed)
            write_safetensors(file, eye.state_dict(), {})
        how = Picture(of.resolution, of.resolution, of.num_inference_steps, of.guidance_scale)
        return Studio(pipe, eye, how, of.pictures, of.seed)

    @cached_property
    def training(self) -> Training:
        """The training settings that all adapters share."""
        of = self.study
        return Training(
            of.output, of.steps, of.resolution, of.class_images, of.num_inference_steps, of.guidance_scale, of.seed, of.jobs
        )

    @cached_property
    def arms(self) -> dict[Task, list[Arm]]:
        """All adapters by task, at their best rates, which are compared first.

        For the subject: every method at every size, and the first method's largest size again with prior preservation. For the
        style: every method at its largest size.
        """
        planned = {task: [arm for method in self.study.methods for arm in self._sizes(task, method)] for task in TASKS}
        every = [arm for task in TASKS for arm in planned[task]]
        chosen = best_rates(self.training, self.studio, every, self.study.rate_factors)
        found = {task: [replace(arm, rate=chosen[arm.name]) for arm in planned[task]] for task in TASKS}
        largest = [arm for arm in found["subject"] if arm.method == self.study.methods[0]][-1]
        found["subject"].append(replace(largest, prior=True))
        return found

    def _sizes(self, task: Task, method: str) -> list[Arm]:
        one = Arm(task, method, 1, RATES[method])
        arms = [replace(one, size=size) for size in sorted(self.study.ranks if one.by_rank else self.study.n_components)]
        return arms if task == "subject" else arms[-1:]

    def _measured(self, task: Task, arm: Arm | None) -> Result:
        folder = None if arm is None else self.training.adapter(arm)
        file = self.study.output / "measures" / f"{task if arm is None else arm.name}.json"
        if not file.exists():
            write_atomically(file, (json.dumps(measured(self.studio, task, folder), indent=1) + "\n").encode())
        found = read_json(file)
        if arm is None or folder is None:
            return Result(None, found)
        metrics = read_metrics(folder)
        return Result(arm, found, metrics["trained_parameters"], metrics["adapter_bytes"], metrics["seconds_per_step"])

    def _base_measures(self) -> dict[str, Any]:
        """Measure how well the base follows captions, and how well the measuring network recognises drawings."""
        of, file = self.study, self.study.output / "measures" / "base.json"
        if not file.exists():
            scenes = drawn_scenes(16 * of.pictures, of.seed + 1)
            told = {
                "followed": prompts_followed(self.studio, scenes),
                "likeness": accuracies(self.studio.eye, self.studio.pipe.vae, of.resolution, min(1000, of.drawings), of.seed),
            }
            write_atomically(file, (json.dumps(told, indent=1) + "\n").encode())
        found: dict[str, Any] = read_json(file)
        return found

    def _pictures(self) -> None:
        """Draw sheets for the first method: subject and style by scale, and the class with and without prior preservation."""
        kept = next(arm for arm in self.arms["subject"] if arm.prior)
        styled, alone = self.arms["style"][0], replace(kept, prior=False)
        of, folder = self.training, self.study.output
        write_atomically(folder / "scales.png", as_png(scales_sheet(self.studio, of.adapter(kept), of.adapter(styled))))
        shown = {"base": None, "without prior preservation": of.adapter(alone), "with prior preservation": of.adapter(kept)}
        write_atomically(folder / "class.png", as_png(class_sheet(self.studio, shown)))
