"""Settings, bases and images for the tests of train-image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

import loca_vision.diffusers  # noqa: F401  the pipelines' methods
from support import flow_pipelines as flow
from support import pipelines as tiny
from support.photographs import scene
from support.scripts import main

TRAIN = "text_to_image/train"
FAMILIES = {
    "sd": lambda: tiny.small(tiny.stable_diffusion()),
    "xl": lambda: tiny.small(tiny.stable_diffusion_xl()),
    "sd3": flow.stable_diffusion_3,
    "flux": flow.flux,
    "klein": flow.flux2_klein,
    "flux2": flow.flux2,
}
FEW = ("--resolution", "16", "--report_to", "none", "--lr_warmup_steps", "0", "--seed", "3", "--train_batch_size", "2")
FEW += ("--n_components", "10", "--learning_rate", "2e-2", "--location_lr", "1e-2", "--adam_epsilon", "1e-4")
FEW += ("--coefficient_steps", "2", "--location_steps", "1", "--learning_steps", "5", "--max_train_steps", "4")
FEW += ("--validation_inference_steps", "2", "--num_validation_images", "1")
PRIOR = ("--with_prior_preservation", "--class_prompt", "a cat", "--num_class_images", "3")
SHORT = ("--max_sequence_length", "16")  # of the families in which it can be chosen


def photographs(folder: Path, count: int = 5) -> Path:
    """Photographs of several shapes, without captions."""
    folder.mkdir(parents=True)
    for number in range(count):
        scene(40).rotate(17 * number).crop((0, 4, 40, 22 if number % 2 else 38)).save(folder / f"{number}.png")
    return folder


def captioned(folder: Path, count: int = 5) -> Path:
    """The same with captions in text files."""
    photographs(folder, count)
    for number in range(count):
        (folder / f"{number}.txt").write_text(["a cat", "make it red"][number % 2])
    return folder


def run(out: Path, *arguments: Any) -> int:
    return main(TRAIN, "--output_dir", out, *arguments)


def trained(out: Path, *arguments: Any) -> dict[str, Any]:
    """Train, and return the metrics of the run."""
    assert run(out, *arguments) == 0
    return json.loads((out / "metrics.json").read_text())


def pipeline(base: Path) -> Any:
    return tiny.quiet(DiffusionPipeline.from_pretrained(base, **({"safety_checker": None} if base.name == "sd" else {})))


def length_of(family: str) -> tuple[str, ...]:
    return () if family in ("sd", "xl") else SHORT
