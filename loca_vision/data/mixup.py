"""Mixup: each image is blended with another, and its class with the other's (Zhang et al., 2018)."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from torch.utils.data import Dataset

from loca_vision.data.sampling import stream_seed
from loca_vision.data.transforms import Transformed

_MIXUP = 7  # a key of the stream of random numbers


class Mixed(Dataset[tuple[Tensor, Tensor]]):
    """share * x_i + (1 - share) * x_j and likewise their classes, with j and the share drawn for each image and epoch.

    The draws depend only on (seed, epoch, index), not on the batch or the number of processes.

    Args:
        images: the images as the model takes them.
        classes: the number of classes; an item has (classes,) float32 instead of the class index.
        alpha: the share is drawn from Beta(alpha, alpha), equation 1 there.
        seed: the seed of the draws.
    """

    def __init__(self, images: Transformed, classes: int, alpha: float, seed: int) -> None:
        self.images, self.classes, self.alpha, self.seed = images, classes, alpha, seed

    def set_epoch(self, epoch: int) -> None:
        """As `Transformed.set_epoch`."""
        self.images.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        draws = random.Random(stream_seed(self.seed, self.images.epoch, index, _MIXUP))
        share, other = draws.betavariate(self.alpha, self.alpha), draws.randrange(len(self))
        (mine, my_class), (theirs, their_class) = self.images[index], self.images[other]
        target = torch.zeros(self.classes)
        target[my_class] += share
        target[their_class] += 1 - share
        return share * mine + (1 - share) * theirs, target
