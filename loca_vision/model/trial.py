"""Whether the layers of a model are called with a batch: each sample's part of it one after the other, and equally large.

That is so in nearly all models. A layer that makes position biases sees no batch, and one that is called with the tokens first
has it on another axis: there, no sample can have an update of its own. A model is tried on one sample and on two, once.
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
_TRIED: weakref.WeakKeyDictionary[nn.Module, set[Any]] = weakref.WeakKeyDictionary()  # with inputs of these forms


class Trial(Mixture):
    """A call that mixes nothing, and notes with how many vectors along the first axis each layer is called."""

    def __init__(self) -> None:
        super().__init__([()])
        self.leads: dict[int, list[int]] = {}

    def fit(self, batch: int, called: str) -> None:
        """Any batch will do."""

    def note(self, handle: int, lead: int) -> None:
        self.leads.setdefault(handle, []).append(lead)


def try_once(
    model: nn.Module, call: Callable[..., Any], inputs: tuple[Any, ...], named: Mapping[str, Any], mixture: Mixture
) -> None:
    """Find out which layers are called with a batch, unless that is known, or all samples are to be treated alike.

    Args:
        call: what the model is called by, without hooks.
        inputs, named: what it is called with now.

    Raises:
        RuntimeError: the model fails on one or two samples, or batch normalisation trains, which would count them.
    """
    if isinstance(mixture, Trial) or not mixture.differs():
        return
    if model.training and any(isinstance(module, _BatchNorm) and module.training for module in model.modules()):
        raise RuntimeError(NORMS_TRAIN)
    known, form = _TRIED.setdefault(model, set()), _form((inputs, dict(named)))
    if form in known or all(handle in BATCHED for handle in mixture.handles):
        return
    one, two = (_leads(call, inputs, named, mixture, size) for size in (1, 2))
    for handle, leads in one.items():
        BATCHED[handle] = [2 * lead for lead in leads] == two.get(handle)
    known.add(form)


def _leads(call: Callable[..., Any], inputs: Any, named: Any, mixture: Mixture, size: int) -> dict[int, list[int]]:
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
    return trial.leads


def _with(value: Any, batch: int, part: Callable[[Tensor], Tensor]) -> Any:
    """The same arguments for some of the samples: of tensors, and lists, that have as many as the batch."""
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
    """What decides which layers are called, as far as shapes do."""
    if isinstance(value, Tensor):
        return value.dim(), value.dtype
    if isinstance(value, dict):
        return tuple((key, _form(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(_form(item) for item in value[:4])
    return type(value)
