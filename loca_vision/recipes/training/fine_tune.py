"""The loop of supervised fine-tuning, which yields after each optimiser step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from loca_vision.model.schedule import AlternatingSchedule, Phase

Images = Dataset[tuple[Tensor, int]]


@dataclass(frozen=True)
class Step:
    """One optimiser step: its number from 1, the batch's loss, what moved, and the first group's rate."""

    number: int
    loss: float
    phase: Phase | None
    lr: float


def fine_tune(
    model: nn.Module,
    data: Images,
    groups: list[dict[str, Any]],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    schedule: AlternatingSchedule | None = None,
    workers: int = 0,
) -> Iterator[Step]:
    """Train with AdamW on the cross entropy, with rates that fall linearly to zero; yield after every step.

    Args:
        model: the model, on its device; it is put into training mode.
        data: images (3, h, w) and class indices. Each epoch is a permutation drawn from the seed; an incomplete last batch of
            an epoch is left out.
        groups: parameter groups as optimisers take them.
        steps: number of optimiser steps.
        schedule: the schedule of coefficients and locations, for an adapted model.
    """
    optimiser = torch.optim.AdamW(groups)
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    device = next(model.parameters()).device
    model.train()
    for number, (images, labels) in enumerate(_batches(data, batch_size, steps, seed, workers), start=1):
        loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        taken = Step(number, loss.item(), schedule.phase if schedule else None, float(decay.get_last_lr()[0]))
        optimiser.step()
        decay.step()
        if schedule:
            schedule.step()
        yield taken


def _batches(data: Images, size: int, count: int, seed: int, workers: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.Generator().manual_seed(seed)
    size = min(size, len(data))  # type: ignore[arg-type]
    loader = DataLoader(data, size, shuffle=True, drop_last=True, generator=order, num_workers=workers)
    while count > 0:
        for batch in loader:
            yield batch
            count -= 1
            if not count:
                return
