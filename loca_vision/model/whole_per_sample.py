"""Give each sample the tensors that its own adapter trains as a whole, such as a classifier head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.nn.modules.batchnorm import _BatchNorm

from loca_vision.functional.transforms import compiled
from loca_vision.layers.mixed_call import operator
from loca_vision.layers.mixtures import BATCHED, Entry, HeldAdapter, Mixture, handle_of, mixture_of, owner_of
from loca_vision.model.state import AdapterState
from loca_vision.model.trial import NORMS_TRAIN
from loca_vision.model.watching import Watch, watch
from loca_vision.model.whole_tensors import held_at
from loca_vision.offload import split_path

_Tensors = dict[str, Tensor]  # of one module, by attribute


class WholeMixture(Mixture):
    """The tensors of each sample for one module; samples that share a supplier have the same object."""

    def __init__(self, around: Mixture, by_entry: Sequence[_Tensors]) -> None:
        super().__init__(around.entries)
        self.around, self.by_entry = around, by_entry

    def groups(self) -> list[tuple[_Tensors, list[int]]]:
        """Return the tensors of each supplier, and the samples that have them."""
        found: dict[int, tuple[_Tensors, list[int]]] = {}
        for sample, index in enumerate(self.around.samples):
            tensors = self.by_entry[index]
            found.setdefault(id(tensors), (tensors, []))[1].append(sample)
        return list(found.values())

    def is_held_by(self, module: nn.Module) -> bool:
        """Whether all samples have the very tensors that the module itself holds, so that its own output is right."""
        groups, held = self.groups(), {**module._parameters, **module._buffers}
        return len(groups) == 1 and all(held.get(name) is tensor for name, tensor in groups[0][0].items())

    def note(self, handle: int, x: Tensor) -> None:
        self.around.note(handle, x)


def suppliers(entries: Sequence[Mapping[str, float]], held: Mapping[str, HeldAdapter]) -> list[str | None]:
    """Return, for each entry, the adapter that supplies the whole tensors: the last one that has any, or None for the base."""
    return [next((name for name in reversed(list(entry)) if held[name].whole), None) for entry in entries]


def whole_mixtures(model: nn.Module, record: AdapterState | None, mixture: Mixture) -> dict[int, Mixture]:
    """Return the tensors of each sample for every module that has such tensors, by the module's handle.

    Raises:
        ValueError: a tensor belongs to the model itself and not to a layer that is called with the batch.
    """
    wholes = [_whole(entry) for entry in mixture.entries]
    keys = dict.fromkeys(key for whole in wholes for key in whole)
    keys |= dict.fromkeys(record.base if record is not None else ())
    found: dict[int, Mixture] = {}
    for module, names in _by_module(model, keys).items():
        held = {key: held_at(model, key) for key in names}
        base = {key: held[key] if record is None else record.base.get(key, held[key]) for key in names}
        made: dict[int, _Tensors] = {}
        by_entry = []
        for whole in wholes:
            if id(whole) not in made:
                made[id(whole)] = {name: _like(whole.get(key, base[key]), held[key]) for key, name in names.items()}
            by_entry.append(made[id(whole)])
        found[_watch(module)] = WholeMixture(mixture, by_entry)
    return found


def _like(tensor: Tensor, held: Tensor) -> Tensor:
    """Return the tensor in the model's current dtype and on its current device, which adapters do not follow."""
    return tensor if held.device.type == "meta" else tensor.to(held.device, held.dtype)


_NOTHING: Mapping[str, Tensor] = {}


def _whole(entry: Entry) -> Mapping[str, Tensor]:
    return next((adapter.whole for adapter, _ in reversed(entry) if adapter.whole), _NOTHING)


def _by_module(model: nn.Module, keys: Sequence[str] | Mapping[str, Any]) -> dict[nn.Module, dict[str, str]]:
    """Return, for each module, the names of its tensors by key."""
    found: dict[nn.Module, dict[str, str]] = {}
    for key in keys:
        module, name = split_path(model, key)
        if module is model:
            raise ValueError(
                f"{key} is trained as a whole, and per_sample cannot give each sample its own: that is possible for layers "
                "that are called with the batch"
            )
        found.setdefault(module, {})[key] = name
    return found


class _Replace(Watch):
    """A hook that replaces a module's output with what the samples' own tensors compute."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not compiled():
            return _in_mixture(module, inputs, output)
        if self.handle == 0:
            return output
        if torch.is_grad_enabled():
            return _outside(module, inputs, output)
        return _mixed_whole(inputs[0], output, self.handle)


def _watch(module: nn.Module) -> int:
    return watch(module, _Replace, module._forward_hooks, module.register_forward_hook)


@_disable_dynamo
def _outside(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return _in_mixture(module, inputs, output)


def _in_mixture(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    mixture = mixture_of(module)
    if mixture is not None and inputs and isinstance(inputs[0], Tensor):
        mixture.note(handle_of(module), inputs[0])
    if not isinstance(mixture, WholeMixture) or mixture.is_held_by(module):
        return output
    return _outputs(module, mixture, inputs)


def _outputs(module: nn.Module, mixture: WholeMixture, inputs: tuple[Any, ...]) -> Tensor:
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
        raise RuntimeError(f"per_sample: a {type(module).__name__} with tensors of an adapter is called with more than a batch")
    x, samples = inputs[0], len(mixture.around.samples)
    if BATCHED.get(handle_of(module)) is False or x.dim() < 2 or len(x) % samples:
        raise ValueError(
            f"per_sample: a {type(module).__name__} with tensors of an adapter is called with {tuple(x.shape)}, which are not "
            f"those of one sample after the other, of {samples}"
        )
    if isinstance(module, _BatchNorm) and module.training:
        raise RuntimeError(NORMS_TRAIN)
    each = x.reshape(samples, -1, *x.shape[1:])
    found: dict[int, Tensor] = {}
    for tensors, own in mixture.groups():
        part = each[torch.tensor(own, device=x.device)]
        result = _with(module, tensors).forward(part.flatten(0, 1))
        found |= dict(zip(own, result.view(len(own), -1, *result.shape[1:]), strict=True))
    if len({one.shape for one in found.values()}) > 1:
        sizes = ", ".join(str(size) for size in sorted({one.shape[-1] for one in found.values()}))
        raise ValueError(
            f"per_sample: the heads of these adapters have different sizes ({sizes}), which do not make one output: call "
            "model.forward_features(x), and loca_vision.head_logits(model, features, names)"
        )
    return torch.stack([found[sample] for sample in range(samples)]).flatten(0, 1)


def _with(module: nn.Module, tensors: _Tensors) -> Any:
    """Return a view of the module with other tensors; the module itself is not changed, because other threads use it too."""
    view = object.__new__(type(module))
    own = {kind: {**vars(module)[kind], **_of_kind(vars(module)[kind], tensors)} for kind in ("_parameters", "_buffers")}
    view.__dict__ = {name: value for name, value in vars(module).items() if name != "forward"} | own
    return view


def _of_kind(there: Mapping[str, Any], tensors: _Tensors) -> _Tensors:
    return {name: tensor for name, tensor in tensors.items() if name in there}


def _compute(x: Tensor, output: Tensor, handle: int) -> Tensor:
    module = owner_of(handle)
    mixture = None if module is None else mixture_of(module)
    if module is None or not isinstance(mixture, WholeMixture) or mixture.is_held_by(module):
        return output.clone()
    found = _outputs(module, mixture, (x,))
    if found.shape != output.shape:
        raise ValueError(
            f"per_sample: the heads give {tuple(found.shape)} where the model was compiled for {tuple(output.shape)}: "
            "call model.forward_features(x), and loca_vision.head_logits(model, features, names)"
        )
    return found.to(output.dtype)


_mixed_whole = operator("mixed_whole", _compute, "(Tensor x, Tensor output, int handle) -> Tensor")


@_mixed_whole.register_fake
def _(x, output, handle):  # type: ignore[no-untyped-def]
    return torch.empty_like(output)
