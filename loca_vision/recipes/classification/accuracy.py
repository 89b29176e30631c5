"""The accuracy of a classifier on images it has not seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset


@torch.no_grad()
def confusion(
    model: nn.Module,
    images: Dataset[tuple[Tensor, int]],
    classes: int,
    *,
    batch_size: int = 64,
    workers: int = 0,
    share: slice = slice(None),
    computing: AbstractContextManager[Any] | None = None,
) -> Tensor:
    """Return how many images of each class (row) were classified as each class (column): (classes, classes) int64.

    The model is in evaluation mode.

    Args:
        share: which of the images to use, such as `slice(rank, None, processes)` for one of several processes.
        computing: an autocast context; None for full precision.
    """
    model.eval()
    device = next(model.parameters()).device
    positions = range(len(images))[share]  # type: ignore[arg-type]
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    with computing or nullcontext():
        for batch, labels in _batches(images, positions, batch_size, workers):
            answers = model(batch.to(device)).argmax(1).cpu()
            matrix += torch.bincount(labels * classes + answers, minlength=classes * classes).view(classes, classes)
    return matrix


def _batches(
    images: Dataset[tuple[Tensor, int]], positions: Sequence[int], batch_size: int, workers: int
) -> Iterator[tuple[Tensor, Tensor]]:
    own = torch.Generator()  # otherwise the loader would draw from the global one
    part = images if len(positions) == len(images) else Subset(images, positions)  # type: ignore[arg-type]
    if len(positions):
        yield from DataLoader(part, batch_size, num_workers=workers, generator=own)


def balanced_accuracy_of(matrix: Tensor) -> float:
    """Return the mean, over the classes that have images, of the share of correctly classified images."""
    images = matrix.sum(1)
    seen = images > 0
    return float((matrix.diagonal()[seen] / images[seen]).double().mean()) if seen.any() else 0.0


def accuracy_of(matrix: Tensor) -> float:
    """Return the share of correctly classified images."""
    return int(matrix.diagonal().sum()) / max(1, int(matrix.sum()))
