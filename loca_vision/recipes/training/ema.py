"""Exponential moving averages of the trained tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loca_vision.checks import check_count, check_share, is_finite
from loca_vision.methods.spectrum import Spectrum
from loca_vision.model.traversal import all_updates

_PREFIX, _STEPS = "ema.", "ema_steps"


@dataclass(frozen=True)
class Decay:
    """The share of the average that is kept at each step, with the rule and defaults of diffusers' `EMAModel`.

    Args:
        most: the value that the share approaches and never exceeds.
        least: the smallest share, once it is above 0.
        update_after_step: until this step, the average is what is trained.
        warmup: rise as 1 - (1 + step / inv_gamma)^-power instead of (1 + step) / (10 + step).

    Raises:
        ValueError: a number is out of its range.
    """

    most: float = 0.9999
    least: float = 0.0
    update_after_step: int = 0
    warmup: bool = False
    inv_gamma: float = 1.0
    power: float = 2 / 3

    def __post_init__(self) -> None:
        check_share("most", self.most)
        check_share("least", self.least)
        check_count("update_after_step", self.update_after_step, 0)
        for name in ("inv_gamma", "power"):
            if not is_finite(getattr(self, name)) or getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected a finite number above 0")

    def at(self, step: int) -> float:
        """Return the share for the update after optimiser step `step`, counted from 1."""
        step = step - self.update_after_step - 1
        if step <= 0:
            return 0.0
        rising = 1 - (1 + step / self.inv_gamma) ** -self.power if self.warmup else (1 + step) / (10 + step)
        return max(min(rising, self.most), self.least)


class EMA:
    """Averages of trained tensors by name, on their devices and in at least float32, because lower precision loses small steps.

    Locations are copied instead of averaged: the mean of two cells is a third, where no component has been. All others are
    averaged at every step, even in those in which an alternating schedule freezes them.

    Args:
        trained: the tensors that are trained, by name.
        taken: the names of those that are copied as they are.

    Raises:
        ValueError: a name in `taken` is not trained.
    """

    def __init__(
        self, trained: Mapping[str, Tensor], decay: Decay | None = None, *, taken: frozenset[str] = frozenset()
    ) -> None:
        if not taken <= trained.keys():
            raise ValueError(f"taken={min(taken - trained.keys())!r}: it is not among what is trained")
        self.trained, self.taken, self.decay = dict(trained), taken, decay or Decay()
        self.steps = 0
        self.averages = {name: _exact(value) for name, value in trained.items()}

    @torch.no_grad()
    def step(self) -> None:
        """Update the averages; call this once after each optimiser step."""
        self.steps += 1
        moving = 1 - self.decay.at(self.steps)
        for name, average in self.averages.items():
            if name in self.taken or not average.is_floating_point():
                average.copy_(self.trained[name])
            else:
                average.sub_(moving * (average - self.trained[name].to(average.dtype)))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averages into the model inside the `with`, as for validation or saving; then restore it bit for bit."""
        before = {name: value.detach().clone() for name, value in self.trained.items()}
        self._put(self.averages)
        try:
            yield
        finally:
            self._put(before)

    def state(self) -> dict[str, Tensor]:
        """Return the state for a checkpoint: the averages as `ema.NAME`, and the number of steps."""
        return {f"{_PREFIX}{name}": value for name, value in self.averages.items()} | {_STEPS: torch.tensor(self.steps)}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a state; other tensors are ignored.

        Raises:
            ValueError: a tensor is missing, superfluous, or of another shape; nothing is changed then.
        """
        stored = {name.removeprefix(_PREFIX): value for name, value in tensors.items() if name.startswith(_PREFIX)}
        for name in sorted(stored.keys() ^ self.averages.keys()):
            raise ValueError(f"{_PREFIX}{name}: it is {'missing' if name in self.averages else 'of nothing that is trained'}")
        for name, value in stored.items():
            if value.shape != self.averages[name].shape:
                raise ValueError(f"{_PREFIX}{name} is {tuple(value.shape)}, not {tuple(self.averages[name].shape)}")
        if _STEPS not in tensors:
            raise ValueError(f"{_STEPS}: it is missing")
        self.steps = int(tensors[_STEPS])
        for name, value in stored.items():
            self.averages[name].copy_(value)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.trained[name].copy_(value)


def _exact(value: Tensor) -> Tensor:
    """Return a copy, in float32 if the numbers have fewer bits."""
    small = value.is_floating_point() and value.element_size() < 4
    return value.detach().to(torch.float32 if small else value.dtype, copy=True)


def locations_among(model: nn.Module, trained: Mapping[str, Tensor]) -> frozenset[str]:
    """Return the names of the trained tensors that are locations of spectra."""
    locations = {id(update.locations) for update in all_updates(model) if isinstance(update, Spectrum)}
    return frozenset(name for name, value in trained.items() if id(value) in locations)
