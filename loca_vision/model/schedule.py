"""The schedule for training coefficients and locations in turns (LoCA, section 4.4, Algorithm 1), and parameter groups."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch.distributed as dist
from torch import nn

from loca_vision.methods.spectrum import Spectrum, confine
from loca_vision.model.activation import trainable_updates
from loca_vision.model.sharding import check_sharding
from loca_vision.model.state import state_of
from loca_vision.model.traversal import unwrap
from loca_vision.model.whole_tensors import trained_whole

Phase = Literal["coefficients", "locations", "both"]


def phase_at(
    step: int, coefficient_steps: int, location_steps: int, learning_steps: int | None, together: bool = False
) -> Phase:
    """Return what moves at optimiser step `step`, counted from 0; with `learning_steps` None, phases alternate to the end."""
    if learning_steps is not None and step >= learning_steps:
        return "coefficients"
    if together:
        return "both"
    return "coefficients" if step % (coefficient_steps + location_steps) < coefficient_steps else "locations"


class AlternatingSchedule:
    """A schedule that freezes, in turns, the coefficients or the locations of every spectrum whose locations are learned.

    The frozen parameters have no gradient at all, so no optimiser moves them, not even by momentum or weight decay. Call
    `step()` once after each `optimizer.step()`, however many micro-batches that step accumulated.

    Args:
        model: a model with adapters. The schedule ignores adapters that are inactive or fully frozen when it is created, and
            updates without locations to learn: those of a loaded adapter, whose locations are final, and of other methods. If
            there are no others, the phase is always "coefficients". With DistributedDataParallel, pass the wrapped model, with
            `find_unused_parameters=True`: if it were wrapped later, parameters frozen at that moment would never be
            synchronised. With FSDP 2, pass the model after `fully_shard`.
        coefficient_steps: B_a, the number of steps in a period for which the coefficients move, at least 0.
        location_steps: B_l, the number of steps for which the locations then move, at least 0.
        learning_steps: B_s, the number of steps after which the locations are final. 0 for fixed random locations (V1 of
            Table 5), None for alternating to the end (V2).
        together: whether to move both at each of the `learning_steps` instead (V3).

    Raises:
        ValueError: a setting is out of range, the model has no trainable adapter, or several processes train a model that is
            neither wrapped nor sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        coefficient_steps: int = 10,
        location_steps: int = 20,
        learning_steps: int | None = 120,
        together: bool = False,
    ) -> None:
        _check_steps(coefficient_steps=coefficient_steps, location_steps=location_steps, learning_steps=learning_steps)
        if coefficient_steps + location_steps == 0:
            raise ValueError("coefficient_steps=0, location_steps=0: a period has at least one step")
        _check_wrapped(model)
        self._settings = (coefficient_steps, location_steps, learning_steps, bool(together))
        self._spectra = [u for u in trainable_updates(model) if isinstance(u, Spectrum) and not u.final]
        for spectrum in self._spectra:
            spectrum.scheduled = True
        self._step = 0
        self._apply()

    @property
    def phase(self) -> Phase:
        """What moves at the next optimiser step."""
        return phase_at(self._step, *self._settings) if self._spectra else "coefficients"

    @property
    def steps_done(self) -> int:
        """The number of optimiser steps so far."""
        return self._step

    def step(self) -> None:
        """Advance the schedule; call this once after each optimiser step."""
        if self.phase != "coefficients":
            confine(self._spectra)
        self._step += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        names = ("coefficient_steps", "location_steps", "learning_steps", "together")
        return {"step": self._step, **dict(zip(names, self._settings, strict=True))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from the state of a schedule with the same settings.

        Raises:
            ValueError: the state has other settings, or is not the state of a schedule.
        """
        mine = self.state_dict()
        for key in mine:
            if key not in state or (key != "step" and state[key] != mine[key]):
                raise ValueError(f"{key}={state.get(key)!r} in the saved schedule, {mine[key]!r} in this one")
        _check_steps(step=state["step"])
        self._step = state["step"]
        self._apply()

    def _apply(self) -> None:
        for spectrum in self._spectra:
            moved = [number.requires_grad for number in spectrum.parameters()]
            _let_move(spectrum.coefficients, self.phase != "locations")
            _let_move(spectrum.locations, self.phase != "coefficients")
            if moved != [number.requires_grad for number in spectrum.parameters()]:
                _touch(spectrum)


def _check_wrapped(model: nn.Module) -> None:
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not check_sharding(model) and several and not isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "several processes train: wrap the model in DistributedDataParallel, or shard it with fully_shard, before its "
            "schedule is made"
        )


def _let_move(parameter: nn.Parameter, moves: bool) -> None:
    parameter.requires_grad_(moves)
    if not moves:
        parameter.grad = None  # optimisers skip a parameter without a gradient entirely, including momentum and weight decay


def _touch(spectrum: Spectrum) -> None:
    """Rewrite the dict of the parameters: compiled code of some versions, such as torch 2.11, checks them only after that."""
    held = dict(spectrum._parameters)
    spectrum._parameters.clear()
    spectrum._parameters.update(held)


def parameter_groups(
    model: nn.Module, *, lr: float, location_lr: float = 1e-4, head_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return parameter groups for any torch optimiser: coefficients, locations (never decayed) and all else that is trainable.

    For methods without a spectrum, the factors and magnitudes take the place of the coefficients.

    Args:
        model: a model with adapters, in any phase of a schedule.
        lr: the learning rate of the coefficients.
        location_lr: the learning rate of the locations, as a fraction of the whole axis per step: with Adam, about
            location_lr * (p - 1) cells.
        head_lr: the learning rate of everything else that is trainable, usually the classifier head; `lr` by default.
        weight_decay: the weight decay of coefficients and head.

    Returns:
        Dicts with `params`, `lr`, `weight_decay` and `name` ("coefficients", "locations", "head"); empty groups are left out.

    Raises:
        ValueError: a rate is not a finite number of at least 0, or the model has no trainable adapter.
    """
    rates = {"lr": lr, "location_lr": location_lr, "head_lr": lr if head_lr is None else head_lr}
    for field, value in (rates | {"weight_decay": weight_decay}).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{field}={value!r}: expected a finite number from 0 up")
    learned = trainable_updates(model)
    check_sharding(model)
    moving = [p for u in learned for p in u.location_parameters()]
    record = state_of(model)
    head = [] if record is None else trained_whole(unwrap(model), record)
    groups = [
        {"name": "coefficients", "params": [p for u in learned for p in u.trainable()], "lr": lr, "weight_decay": weight_decay},
        {"name": "locations", "params": moving, "lr": location_lr, "weight_decay": 0.0},
        {"name": "head", "params": head, "lr": rates["head_lr"], "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


def _check_steps(**steps: object) -> None:
    for field, value in steps.items():
        if value is None and field == "learning_steps":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{field}={value!r}: expected a whole number from 0 up")
