"""The protocol of peft's image generation benchmark: the training data, the pictures to draw, and the seeds.

The values are those of default_training_params.json in method_comparison/image-gen of huggingface/peft, and `train_config`
returns them under the names used there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from loca_vision.checks import check_count, is_finite
from loca_vision.data.captions import read_captioned
from loca_vision.data.images import as_png, open_image
from loca_vision.storage.atomic_file import write_atomically

INSTANCE_PROMPTS = (
    "sks cat sitting on a chair in front of a box of chocolates",
    "sks cat playing on the Steam Deck",
    "sks cat wearing a necklace while sitting in a box on a sofa",
    "a box with four donuts in front of sks cat",
    "sks cat wearing a pink veil with flowers on it and a dagger made out of yellow cardboard",
    "sks cat between two pillows, with one pillow showing a polar bear and the other a fox",
    "sks cat with an espresso reading the newspaper",
    "a close up of a hand petting sks cat on the head",
    "sks cat opens a white door",
    'sks cat with a VIP "all access" pass',
    'sks cat in front of a monitor showing the video game "RimWorld"',
    "sks cat reads a newspaper about cannabis",
    'sks cat reading the newspaper with the title "DIE BOX"',
    "sks cat being fed sushi",
    "sks cat in front of a box of tomatoes",
    "a gingerbread house in front of sks cat",
    "sks cat is wearing a Wednesday Addams costume",
    "sks cat looks skeptical as he reads a magazine depicting a black cat",
    "sks cat wearing a striped scarf",
    "sleepy sks cat lying in bed covered by a blue blanket",
)
SAMPLE_PROMPTS = (
    "a photo of sks cat",
    "a color drawing of sks cat",
    "sks cat at the beach",
    "a photo of sks dog",
    "a photo of an orange cat",
)
DRIFT_PROMPTS = (
    "a photo of cat",
    "a color drawing of cat",
    "cat sitting in a bathtub",
    "cat looks into a mirror",
    "a photo of cat next to a tree",
    "the Mona Lisa but she looks angry",
    "a dog holding a sign that says hello world",
    "a photo of the Eiffel tower at night",
    "an astronaut riding a horse",
    "3d design concept of a chair that looks like an avocado",
)
TEST_REPEATS = 3  # pictures per test prompt
SCORE_SEED, DRIFT_SEED = 100_000, 100_000_000  # added to the seed: for validation, test and samples; for drift
_SPLIT_SEED = 0  # fixed in the benchmark


@dataclass(frozen=True)
class Protocol:
    """The protocol; a run with values other than the defaults is not peft's benchmark, and says so"""

    base: str = "black-forest-labs/FLUX.2-klein-base-4B"
    """Pipeline of FLUX.2 klein: a folder, or its name on the hub."""
    dataset: str = "peft-internal-testing/cat-image-dataset"
    """Images, in the order of their prompts: a folder, or a data set on the hub."""
    image_column: str = "image"
    """Column of the images."""
    dino: str = "facebook/dinov2-base"
    """DINOv2 model for comparing images: a folder, or its name on the hub."""
    instance_prompts: tuple[str, ...] = INSTANCE_PROMPTS
    """Caption of each image."""
    valid_size: int = 2
    """Number of validation images."""
    test_size: int = 4
    """Number of test images."""
    resolution: int = 512
    """Pixels per side."""
    batch_size: int = 2
    """Images per step."""
    max_steps: int = 750
    """Optimiser steps."""
    eval_steps: int = 100
    """Steps between validations."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the frozen weights, and of the products in training."""
    use_gc: bool = True
    """Gradient checkpointing."""
    weight_decay: float = 1e-4
    """Weight decay of AdamW."""
    num_inference_steps: int = 20
    """Denoising steps of every picture."""
    guidance_scale: float = 3.5
    """How strongly pictures follow their prompts."""
    max_sequence_length: int = 512
    """Maximum number of tokens per prompt."""
    text_encoder_out_layers: tuple[int, ...] = (10, 20, 30)
    """Layers of the language model whose states encode a prompt; the pipeline itself would use 9, 18 and 27."""
    seed: int = 0
    """Seed of training; the seeds of pictures are offsets from it."""

    def check(self) -> None:
        """Check the settings.

        Raises:
            ValueError: a value is out of range; the message is one sentence.
        """
        counts = ("valid_size", "test_size", "resolution", "batch_size", "max_steps", "eval_steps", "num_inference_steps")
        for name in (*counts, "max_sequence_length"):
            check_count(name, getattr(self, name))
        for name in ("weight_decay", "guidance_scale"):
            if not is_finite(getattr(self, name)) or getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a finite number from 0 up")
        if self.eval_steps > self.max_steps:
            raise ValueError(f"eval_steps={self.eval_steps}: expected at most max_steps, {self.max_steps}")
        held = self.valid_size + self.test_size
        if len(self.instance_prompts) <= held:
            raise ValueError(
                f"instance_prompts: expected over {held}, valid_size + test_size, got {len(self.instance_prompts)}"
            )

    def departures(self) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ from the benchmark's, as (own value, benchmark's value) by name.

        The places of base, images and DINOv2 do not count.
        """
        usual = Protocol()
        passed = ("base", "dataset", "image_column", "dino")
        mine = ((field.name, getattr(self, field.name), getattr(usual, field.name)) for field in fields(Protocol))
        return {name: (own, other) for name, own, other in mine if name not in passed and own != other}

    def train_config(self, learning_rate: float) -> dict[str, Any]:
        """Return the dict that peft's result files call `train_config`."""
        same = {field.name: getattr(self, field.name) for field in fields(Protocol)}
        moved = {"model_id": same.pop("base"), "dataset_id": same.pop("dataset"), "dino_model_id": same.pop("dino")}
        rates = {"lr": learning_rate, "weight_decay": same.pop("weight_decay")}
        lists = {name: list(value) for name, value in same.items() if isinstance(value, tuple)}
        return {
            **moved,
            **same,
            **lists,
            "dataset_split": "train",
            "batch_size_eval": 1,
            "repeats": 1000,
            "compile": False,
            "grad_norm_clip": 1.0,
            "optimizer_type": "AdamW",
            "optimizer_kwargs": rates,
            "lr_scheduler": None,
            "use_amp": self.dtype != "float32",
            "autocast_adapter_dtype": True,
            "weighting_scheme": "none",
            "logit_mean": 0.0,
            "logit_std": 1.0,
            "mode_scale": 1.29,
            "dino_image_size": 224,
            "sample_image_prompts": list(SAMPLE_PROMPTS),
            "drift_image_prompts": list(DRIFT_PROMPTS),
        }


@dataclass(frozen=True)
class Held:
    """Held-out images: their files and their prompts."""

    files: tuple[Path, ...]
    prompts: tuple[str, ...]

    def images(self) -> list[Image.Image]:
        """Return the images at their own sizes, upright and RGB."""
        return [open_image(file) for file in self.files]


@dataclass(frozen=True)
class Parts:
    """The images in three parts.

    Args:
        train: a folder of square images, each with its prompt in a .txt file.
        valid, test: the other images at their own sizes.
    """

    train: Path
    valid: Held
    test: Held


def split(count: int, valid: int, test: int) -> tuple[list[int], list[int], list[int]]:
    """Return which of `count` images are for training, validation and test, in the benchmark's order."""
    order = np.arange(count)
    np.random.RandomState(_SPLIT_SEED).shuffle(order)
    first = count - valid - test
    places = order.tolist()
    return places[:first], places[first : first + valid], places[first + valid :]


def prepared(protocol: Protocol, folder: Path) -> Parts:
    """Write the images into a folder; training images are resized to squares without cropping, as in the benchmark.

    Raises:
        OSError, ValueError, ModuleNotFoundError: see `read_captioned`; also ValueError if there is not one prompt per image.
    """
    prompts, done = protocol.instance_prompts, folder / "done"
    where = split(len(prompts), protocol.valid_size, protocol.test_size)
    names = [[folder / part / f"{place:02d}.png" for place in places] for part, places in zip(_PARTS, where, strict=True)]
    if not done.exists():
        images = read_captioned(protocol.dataset, image_column=protocol.image_column, caption="a prompt")
        if len(images) != len(prompts):
            raise ValueError(f"{protocol.dataset}: expected {len(prompts)} images, one for each prompt, got {len(images)}")
        for files, places in zip(names, where, strict=True):
            for file, place in zip(files, places, strict=True):
                image = images[place].image
                _write(file, _squared(image, protocol.resolution) if files is names[0] else image, prompts[place])
        write_atomically(done, b"")
    held = [Held(tuple(files), tuple(prompts[place] for place in places)) for files, places in zip(names, where, strict=True)]
    return Parts(folder / _PARTS[0], *held[1:])


_PARTS: Sequence[str] = ("train", "valid", "test")


def _squared(image: Image.Image, side: int) -> Image.Image:
    return image.resize((side, side), Image.Resampling.BILINEAR)


def _write(file: Path, image: Image.Image, prompt: str) -> None:
    write_atomically(file, as_png(image))
    write_atomically(file.with_suffix(".txt"), prompt.encode())
