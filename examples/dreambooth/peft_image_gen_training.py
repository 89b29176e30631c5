"""Training as in the benchmark: the trainer of train-image, with measurements during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from loca_vision.recipes.diffusion.settings import Method
from loca_vision.recipes.reports.contact_sheet import contact_sheet
from loca_vision.recipes.text_to_image.data import ImageData, images_of
from loca_vision.recipes.text_to_image.models import ImageModels
from loca_vision.recipes.text_to_image.recipe import ImageRecipe
from loca_vision.recipes.text_to_image.task import ImageTask
from peft_image_gen_log import Log, Meter
from peft_image_gen_measures import Dino, Drawer, encoded, pictures, similarity
from peft_image_gen_protocol import SCORE_SEED, Parts, Protocol

CLIP = 1.0  # the largest norm of the gradient


def recipe_of(protocol: Protocol, method: Method, learning_rate: float, folder: Path, images: Path) -> ImageRecipe:
    """Return the settings of train-image that match the benchmark.

    Args:
        method: the settings of the adapter method.
        folder: the output folder of the training.
        images: the folder of training images, from `prepared`.
    """
    return ImageRecipe(
        protocol.base,
        train_data_dir=images,
        resolution=protocol.resolution,
        center_crop=True,  # images are square, so this keeps everything
        train_batch_size=protocol.batch_size,
        max_train_steps=protocol.max_steps,
        learning_rate=learning_rate,
        adam_weight_decay=protocol.weight_decay,
        max_grad_norm=CLIP,
        gradient_checkpointing=protocol.use_gc,
        mixed_precision="no" if protocol.dtype == "float32" else "bf16",
        max_sequence_length=protocol.max_sequence_length,
        weighting_scheme="none",
        validation_steps=protocol.eval_steps,
        checkpointing_steps=protocol.eval_steps,
        checkpoints_total_limit=1,
        resume_from_checkpoint="latest",
        seed=protocol.seed,
        report_to="none",
        output_dir=folder,
        **{field.name: getattr(method, field.name) for field in fields(Method)},
    )


def task_of(protocol: Protocol, parts: Parts, log: Log) -> type[ImageTask]:
    """Return the task class of one run."""
    made: type[ImageTask] = type("BenchmarkTask", (BenchmarkTask,), {"protocol": protocol, "parts": parts, "log": log})
    return made


class BenchmarkTask(ImageTask):
    """Training on captioned images, with a validation by DINOv2 instead of validation pictures alone.

    Raises:
        ValueError: there are several processes.
    """

    protocol: ClassVar[Protocol]
    parts: ClassVar[Parts]
    log: ClassVar[Log]

    def __init__(self, recipe: ImageRecipe, accelerator: Accelerator) -> None:
        if accelerator.num_processes != 1:
            raise ValueError(f"the benchmark is for one process, got {accelerator.num_processes}")
        self._recipe, self.device = recipe, accelerator.device
        self.dino = Dino(self.protocol.dino, self.device)
        self.models = ImageModels(recipe, accelerator)
        pipe = self.models.pipe
        with self.log.stage("encode"):
            pipe.encode_prompt = partial(pipe.encode_prompt, text_encoder_out_layers=self.protocol.text_encoder_out_layers)
            self.data = ImageData(recipe, images_of(recipe), self.models.encoders, accelerator)
            self.drawer = Drawer(pipe, encoded(pipe, self.parts.valid.prompts, self.protocol), self.protocol)
        self.samples, self.digests = self.data.samples, self.data.digests
        self.models.encoders.rest(images=True, texts=True)
        self.meter, self.step = Meter(self.log, self.device), 0

    def loss(self, model: Callable[..., Any], batch: Mapping[str, Any], *, step: int, first: int) -> Tensor:
        self.meter.end()
        if step and step % self.protocol.eval_steps == 0 and step not in self.log.by_step("similarity"):
            self._validate(step)  # the run was stopped between checkpoint and validation
        self.step = step + 1
        self.meter.begin(self.step)
        return super().loss(model, batch, step=step, first=first)

    @property
    def has_pictures(self) -> bool:
        return True

    def sheet(self) -> Image.Image:
        """Validate and return a sheet of the held-out images next to the pictures drawn from their prompts."""
        self.meter.end()
        return self._validate(self.step or self.protocol.max_steps)

    def _validate(self, step: int) -> Image.Image:
        held = self.parts.valid
        with self.log.stage("validate"):
            drawn = pictures(self.drawer, held.prompts, self.protocol.seed + SCORE_SEED)
            found = similarity(self.dino.features(drawn), self.dino.features(held.images()))
        self.log.add(step=step, similarity=found, took=self.log.entries[-1]["seconds"])
        self.meter.forget_pictures()
        rows = list(zip(held.images(), drawn, strict=True))
        return contact_sheet(rows, columns=["image", f"drawn after step {step}"], labels=list(held.prompts))
