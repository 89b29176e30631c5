"""Features of the images from the frozen part of a classifier, computed once, and the part that is trained on them."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from loca_vision.model.heads import classifier
from loca_vision.recipes.classification.recipe import Recipe
from loca_vision.recipes.classification.task import Task

FLAG = "--cache_features"
_FRACTION = 1e-3  # of the largest logit: how far the two ways to compute may differ; they round alike, in bfloat16 too
_DATA = ("dataset", "root", "source", "split_seed", "train_images", "validation_images", "test_images")
_MODEL = ("model", "weights", "image_size", "precision")

Kept = MutableMapping[tuple[Any, ...], tuple[Dataset[Any], Dataset[Any], Dataset[Any]]]
"""Training, validation and test features that earlier runs with the same images and base have computed."""


@dataclass(frozen=True)
class Split:
    """A classifier in two parts: the frozen one, from images to features, and the trained one, from features to logits.

    Args:
        first: number of the block at which the second part begins; -1 if that part is the head alone.
    """

    lower: Callable[[Tensor], Tensor]
    upper: Callable[[Tensor], Tensor]
    first: int


def split(model: nn.Module, recipe: Recipe) -> Split:
    """Split a recipe's classifier: at its head for the linear probe, below the lowest adapted block for adapters.

    Raises:
        ValueError: the head is not a single linear layer; the model is not a timm ViT; or nothing below is frozen.
    """
    if recipe.method == "lp":
        return _at_head(model, recipe)
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, nn.Sequential) or not hasattr(model, "norm") or not hasattr(model, "forward_head"):
        raise ValueError(f"{FLAG}: expected a ViT of timm's, of blocks, a norm and a head; {recipe.model} is another model")
    free = {id(p) for p in model.parameters() if p.requires_grad} - {id(p) for p in classifier(model)}
    lowest = [number for number, block in enumerate(blocks) if any(id(p) in free for p in block.parameters())]
    first = lowest[0] if lowest else len(blocks)
    if not first or free - {id(p) for block in blocks[first:] for p in block.parameters()}:
        raise ValueError(
            f"{FLAG}: nothing below what {recipe.method} trains is frozen; adapt upper blocks only, as in --layers 'blocks.1?'"
        )
    return Split(partial(_seen_by_block, model, first), partial(_from_block, model, first), first)


def _at_head(model: Any, recipe: Recipe) -> Split:
    head = model.get_classifier()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{FLAG}: the head of {recipe.model} is a {type(head).__name__}, not a linear layer")
    return Split(lambda images: model.forward_head(model.forward_features(images), pre_logits=True), head, -1)


class _Reached(Exception):
    """Raised when the block has its input."""


def _seen_by_block(model: Any, first: int, images: Tensor) -> Tensor:
    """Return (n, tokens, width) before a block, or after the last one."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Reached

    handle = (model.blocks[first] if first < len(model.blocks) else model.norm).register_forward_pre_hook(keep)
    try:
        model.forward_features(images)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def _from_block(model: Any, first: int, tokens: Tensor) -> Tensor:
    """Return (n, classes), given the input of a block."""
    for block in [*model.blocks][first:]:
        tokens = block(tokens)
    logits: Tensor = model.forward_head(model.norm(tokens))
    return logits


@torch.no_grad()
def with_features(
    model: nn.Module,
    task: Task,
    recipe: Recipe,
    *,
    device: torch.device,
    computing: AbstractContextManager[Any],
    kept: Kept,
    batch_size: int = 64,
) -> tuple[nn.Module, Task]:
    """Return what is trained, and a task whose images are replaced by the features that it sees of them, computed once.

    What is trained is the head, or the model itself with a `forward` that takes features instead of images.

    Args:
        device: the device to compute on; the model stays there.
        computing: an autocast context, or one that does nothing.
        kept: a cache that is searched first and to which new features are added; in memory, in float32 or the dtype of
            `computing`.

    Raises:
        ValueError: as `split`, or the model does more than run its blocks one after the other.
    """
    parts = split(model, recipe)
    model.to(device).eval()

    def features(images: Dataset[tuple[Tensor, int]]) -> Dataset[tuple[Tensor, int]]:
        loaded = DataLoader(images, batch_size, num_workers=task.workers)
        seen = [(parts.lower(x.to(device)).cpu(), y) for x, y in loaded]
        return TensorDataset(*(torch.cat(part) for part in zip(*seen, strict=True)))  # type: ignore[return-value]

    random = task.spec.seed if task.spec.weights == "none" else None  # the seed of the weights, if they are random
    key = (*(str(getattr(recipe, name)) for name in (*_DATA, *_MODEL)), random, parts.first)
    with computing:
        _check(model, parts, next(iter(DataLoader(task.test, 2)))[0].to(device), recipe)
        if key not in kept:
            kept[key] = (features(task.train), features(task.validation), features(task.test))
    train, validation, test = kept[key]
    task = replace(task, train=train, validation=validation, test=test, workers=0)
    if isinstance(parts.upper, nn.Module):
        return parts.upper, task
    model.forward = parts.upper
    return model, task


def _check(model: nn.Module, parts: Split, images: Tensor, recipe: Recipe) -> None:
    wanted, found = model(images), parts.upper(parts.lower(images))
    if found.shape != wanted.shape or (found - wanted).abs().max() > _FRACTION * wanted.abs().max():
        raise ValueError(f"{FLAG}: {recipe.model} does more than run blocks, a norm and a head; train it without")
