"""Find out whether the layers of a model are called with a batch: equally large parts, one sample after the other.

This is the case in nearly all models. But a layer that computes position biases sees no batch, and a layer that is called with
the tokens first has the batch on another axis, or mixed with the tokens; in such layers, samples cannot have their own updates.
Each model is tried once, on one sample and on two: the first half of a layer's input for two samples must be its input for one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from loca_vision.layers.mixtures import BATCHED, Mixture, mixing
from loca_vision.messages import one_line

NORMS_TRAIN = "per_sample: batch normalisation trains, which mixes the samples of a batch: call model.eval() first"
_TRIED: weakref.WeakKeyDictionary[nn.Module, dict[Any, frozenset[int]]] = weakref.WeakKeyDictionary()
"""The parts of each model, by handle, that have been tried with inputs of each form."""


class Trial(Mixture):
    """A call that mixes nothing and records each layer's input as one number for each vector along the first axis."""

    def __init__(self) -> None:
        super().__init__([()])
        self.seen: dict[int, list[Tensor]] = {}

    def fit(self, batch: int, called: str) -> None:
        """Accept a batch of any size."""

    def note(self, handle: int, x: Tensor) -> None:
        flat = x.detach().reshape(len(x), -1) if x.dim() > 0 and x.numel() else x.new_zeros(0, 1)
        mixed = torch.arange(flat.shape[1], device=x.device).cos()  # plain sums of normalised values would all be equal
        own = (flat * mixed.to(flat.dtype)).sum(1, dtype=torch.float32)
        self.seen.setdefault(handle, []).append(own.cpu() / flat.shape[1] ** 0.5)


def try_once(
    model: nn.Module, call: Callable[..., Any], inputs: tuple[Any, ...], named: Mapping[str, Any], mixture: Mixture
) -> None:
    """Find out which layers are called with a batch, unless this is known or all samples have the same adapters.

    Args:
        model: the model to try.
        call: the method that runs the model, without hooks.
        inputs, named: the arguments of the current call.
        mixture: the mixture of the current call.

    Raises:
        RuntimeError: the model fails on one or two samples, or batch normalisation is in training mode, so that the trial
            would change its statistics.
    """
    if isinstance(mixture, Trial) or not mixture.differs():
        return
    if model.training and any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        raise RuntimeError(NORMS_TRAIN)
    known, form = _TRIED.setdefault(model, {}), _form((inputs, dict(named)))
    if known.get(form, frozenset()).issuperset(mixture.handles):
        return
    one, two = (_seen(call, inputs, named, mixture, size) for size in (1, 2))
    for handle, seen in one.items():
        twice = two.get(handle, [])
        batched = len(seen) == len(twice) and all(map(_is_half, seen, twice))
        BATCHED[handle] = batched and BATCHED.get(handle, True)  # it must hold for every form of inputs
    known[form] = frozenset(mixture.handles)


def _is_half(one: Tensor, two: Tensor) -> bool:
    """Whether a layer's input for one sample is the first half of its input for two.

    Dropout may have changed the input. So if the sizes match, the answer is no only if the input is clearly closer to what it
    would be with the samples side by side.
    """
    lead = len(one)
    if len(two) != 2 * lead:
        return False
    away = (two[:lead] - one).abs().sum()
    others = [(two.view(first, 2, -1)[:, 0].flatten() - one).abs().sum() for first in range(2, lead + 1) if lead % first == 0]
    rounding = 1e-2 * one.abs().sum()
    return not any(2 * other < away - rounding for other in others)


def _seen(call: Callable[..., Any], inputs: Any, named: Any, mixture: Mixture, size: int) -> dict[int, list[Tensor]]:
    trial, batch = Trial(), len(mixture.samples)
    part: Callable[[Tensor], Tensor] = lambda x: x[torch.arange(size, device=x.device) % batch]  # noqa: E731
    some, others = _with((inputs, dict(named)), batch, part)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.no_grad(), torch.random.fork_rng(devices), mixing(dict.fromkeys(mixture.handles, trial)):
        try:
            call(*some, **others)
        except Exception as error:
            raise RuntimeError(
                f"per_sample tried the model on {size} of {batch} samples, to see where its layers have the batch, and it "
                f"failed: {one_line(error, 200)}"
            ) from error
    return trial.seen


def _with(value: Any, batch: int, part: Callable[[Tensor], Tensor]) -> Any:
    """Return the arguments for some of the samples, taking these from tensors and lists that are as long as the batch."""
    if isinstance(value, Tensor):
        return part(value) if value.dim() > 0 and len(value) == batch else value
    if isinstance(value, dict):
        return {key: _with(item, batch, part) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        if isinstance(value, list) and len(value) == batch and all(isinstance(item, Tensor) for item in value):
            return [value[index] for index in part(torch.arange(batch)).tolist()]
        return type(value)(_with(item, batch, part) for item in value) if type(value) in (list, tuple) else value
    return value


def _form(value: Any) -> Any:
    """Return the form of the inputs, which determines what layers are called as far as shapes do."""
    if isinstance(value, Tensor):
        return value.dim(), value.dtype
    if isinstance(value, dict):
        return tuple((key, _form(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_form(item) for item in value[:4])
    return type(value)
