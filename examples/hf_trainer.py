"""Fine-tune an image classifier from transformers with LoCA, using transformers' own Trainer.

    python examples/hf_trainer.py --output_dir digits --controls
    python examples/hf_trainer.py --model google/vit-base-patch16-224-in21k --root photos --output_dir mine

Without --model, a small ViT with random weights is trained on scikit-learn's digits, offline and in under a minute. The script
differs from a Trainer script for full fine-tuning in three places: `inject`, `parameter_groups` for the optimiser, and a
callback for the schedule. Trainer itself handles checkpoints, the best model and resuming, and all of them include the adapter.

--controls verifies this and raises an error if a check fails: the final model evaluates exactly like the best epoch; a run
resumed from the first checkpoint ends with exactly the same numbers as the uninterrupted one; and the saved folder, loaded into
a new model, gives the same logits.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.trainer_callback import ExportableState

from loca_vision import AlternatingSchedule, LoCAConfig, inject, load_adapter, parameter_groups
from loca_vision.data.images import Images, first
from loca_vision.data.transforms import Transform, evaluation_transform
from loca_vision.datasets import load

SMALL = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192, "patch_size": 8}


@dataclass(frozen=True)
class Settings:
    """Fine-tune an image classifier from transformers with LoCA and Trainer."""

    output_dir: Path
    """Folder for the checkpoints; the best model is saved in the folder itself."""
    model: str | None = None
    """Image classifier, on the hub or in a folder; by default a small one with random weights."""
    root: Path | None = None
    """Folder of images with one subfolder per class; by default scikit-learn's digits."""
    images: int | None = None
    """Number of training images, drawn with the seed; by default all."""
    epochs: int = 5
    batch_size: int = 32
    n_components: int = 500
    lr: float = 5e-2
    """Learning rate of the coefficients."""
    head_lr: float = 5e-3
    seed: int = 0
    resume: bool = False
    """Resume from the last checkpoint in the output folder."""
    controls: bool = False
    """Verify that checkpoints contain the adapter. This trains a second time."""


class ScheduleCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Step the schedule after each optimiser step, and save its state in each of Trainer's checkpoints."""

    def __init__(self, schedule: AlternatingSchedule) -> None:
        self.schedule = schedule

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": self.schedule.state_dict()}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.schedule.load_state_dict(state.stateful_callbacks[type(self).__name__]["attributes"])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.schedule.step()


class Inputs(Dataset[dict[str, Any]]):
    """Images in the form that transformers' classifiers expect."""

    def __init__(self, images: Images, transform: Transform) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.images[index]
        return {"pixel_values": self.transform(image), "labels": label}


def classifier(settings: Settings, classes: tuple[str, ...]) -> Any:
    """Build the model before adaptation; every call returns the same weights."""
    torch.manual_seed(settings.seed)
    if settings.model is None:
        return ViTForImageClassification(ViTConfig(**SMALL, image_size=32, num_labels=len(classes)))
    names: dict[str, Any] = {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    return AutoModelForImageClassification.from_pretrained(settings.model, **names, ignore_mismatched_sizes=True)


def transform_for(settings: Settings, model: Any) -> Transform:
    if settings.model is None:
        return evaluation_transform(32, (0.5,) * 3, (0.5,) * 3)
    processor = AutoImageProcessor.from_pretrained(settings.model)
    return evaluation_transform(model.config.image_size, processor.image_mean, processor.image_std)


def accuracy(predictions: Any) -> dict[str, float]:
    return {"accuracy": float((predictions.predictions.argmax(-1) == predictions.label_ids).mean())}


def prepared(settings: Settings, output: Path) -> Trainer:
    """Return a Trainer for the adapted model."""
    name = "digits" if settings.root is None else "folder"
    splits = load(name, settings.root, seed=settings.seed)
    model = classifier(settings, splits.classes)
    transform = transform_for(settings, model)

    inject(model, LoCAConfig(n_components=settings.n_components, seed=settings.seed))
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=settings.lr, head_lr=settings.head_lr))
    schedule = AlternatingSchedule(model)

    arguments = TrainingArguments(
        str(output),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        seed=settings.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="epoch",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        disable_tqdm=True,
    )
    return Trainer(
        model,
        arguments,
        train_dataset=Inputs(first(splits.train, settings.images or len(splits.train), settings.seed), transform),
        eval_dataset=Inputs(splits.validation, transform),
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
        callbacks=[ScheduleCallback(schedule)],
    )


def evaluations(trainer: Trainer) -> list[float]:
    """Return the validation loss of every epoch."""
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def check(settings: Settings, trainer: Trainer) -> None:
    """Raise an error unless the checkpoints contain what was trained.

    Raises:
        RuntimeError: one of the three controls does not hold.
    """
    history = evaluations(trainer)
    _confirm("the model at the end evaluates as the best epoch", trainer.evaluate()["eval_loss"] == min(history))

    checkpoints = sorted(settings.output_dir.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    with TemporaryDirectory() as folder:
        resumed = prepared(settings, Path(folder))
        resumed.train(resume_from_checkpoint=str(checkpoints[0]))
    same = all(torch.equal(resumed.model.state_dict()[key], value) for key, value in trainer.model.state_dict().items())
    _confirm("a resumed run ends with the same numbers", same and evaluations(resumed) == history)

    fresh = type(trainer.model).from_pretrained(settings.output_dir)
    pixels = torch.stack([trainer.eval_dataset[index]["pixel_values"] for index in range(min(8, len(trainer.eval_dataset)))])
    without = logits(fresh, pixels)
    load_adapter(fresh, settings.output_dir)
    wanted = logits(trainer.model, pixels)
    _confirm(
        "the folder gives the same logits", torch.equal(logits(fresh, pixels), wanted) and not torch.equal(without, wanted)
    )


@torch.no_grad()
def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    answer: Tensor = model.cpu().eval()(pixel_values=pixels).logits
    return answer


def _confirm(what: str, holds: bool) -> None:
    if not holds:
        raise RuntimeError(f"this does not hold: {what}")
    print(f"holds: {what}")


def run(settings: Settings) -> None:
    trainer = prepared(settings, settings.output_dir)
    trainer.train(resume_from_checkpoint=settings.resume)
    trainer.save_model(str(settings.output_dir))
    print(f"validation loss of each epoch: {', '.join(f'{loss:.4f}' for loss in evaluations(trainer))}")
    print(f"{settings.output_dir}: the best model, and the adapter beside it")
    if settings.controls:
        check(settings, trainer)


def main() -> int:
    try:
        run(tyro.cli(partial(Settings), description=Settings.__doc__, use_underscores=True))
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
