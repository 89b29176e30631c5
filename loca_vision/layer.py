"""A linear layer whose `weight` reads as W + Delta W, for whoever reads it.

The class of the layer is exchanged for a subclass with a `weight` property; the parameter W stays where it is, so every
key of the `state_dict` does too. Code that goes around `forward`, `F.linear(x, layer.weight)` as in BEiT, EVA and
Swin V2, is adapted like code that does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.rows import Rows, Update, add_rows, row_linear
from loca_vision.spectrum import Spectrum
from loca_vision.targets import Target


@dataclass(frozen=True)
class Place:
    """Whose an update is, which projection it changes, and the rows of the weight that make up that projection."""

    adapter: str
    projection: str
    rows: Rows


class WeightUpdates(nn.Module):
    """The updates of one layer and the weight they make of W."""

    def __init__(self) -> None:
        super().__init__()
        self.spectra = nn.ModuleList()
        self.places: list[Place] = []  # one for each spectrum
        self.strengths: dict[str, float] = {}  # of the adapters that act
        self._kept: _Kept | None = None

    def entries(self) -> list[tuple[Place, Spectrum]]:
        return [(place, self.spectra[i]) for i, place in enumerate(self.places)]  # type: ignore[misc]

    def add(self, adapter: str, target: Target, spectrum: Spectrum) -> None:
        self.spectra.append(spectrum)
        self.places.append(Place(adapter, target.name, target.rows))

    def discard(self, adapter: str) -> None:
        kept = [(place, spectrum) for place, spectrum in self.entries() if place.adapter != adapter]
        self.places = [place for place, _ in kept]
        self.spectra = nn.ModuleList(spectrum for _, spectrum in kept)
        self.strengths.pop(adapter, None)
        self._kept = None

    def forward(self, base: Tensor) -> Tensor:
        """W + sum of the acting updates, in W's dtype and shape; built anew where gradients are wanted, else kept."""
        if not self.strengths:
            return base
        if torch.compiler.is_compiling():
            return add_rows(base, self._deltas())
        values = [base, *self._learned()]
        if torch.is_grad_enabled() and any(value.requires_grad for value in values):
            self._kept = None
            return add_rows(base, self._deltas())
        kept = self._kept  # one reading: another thread may drop it meanwhile
        if kept is None or not kept.holds_for(values, self.strengths):
            with torch.inference_mode(False), torch.no_grad():
                self._kept = kept = _Kept(values, self.strengths, add_rows(base, self._deltas()))
        return kept.weight

    def learns_alone(self, base: Tensor) -> bool:
        """Whether a gradient is wanted of the updates, and none of W."""
        wanted = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not base.requires_grad
        return wanted and any(value.requires_grad for value in self._learned())

    def linear(self, x: Tensor, base: Tensor, bias: Tensor | None) -> Tensor:
        """x (W + sum of the acting updates)^T + bias, where `learns_alone`: no other row's gradient is computed."""
        self._kept = None
        updates = self._deltas()
        with torch.no_grad():
            weight = add_rows(base, updates)
        return row_linear(x, weight, bias, updates)

    def _acting(self) -> list[tuple[Place, Spectrum]]:
        return [(place, spectrum) for place, spectrum in self.entries() if place.adapter in self.strengths]

    def _learned(self) -> list[Tensor]:
        return [parameter for _, spectrum in self._acting() for parameter in spectrum.parameters()]

    def _deltas(self) -> list[Update]:
        """The rows and the update of each projection, summed over the acting adapters."""
        deltas: dict[str, Update] = {}
        for place, spectrum in self._acting():
            delta = spectrum(self.strengths[place.adapter])
            if place.projection in deltas:
                delta = deltas[place.projection][1] + delta
            deltas[place.projection] = place.rows, delta
        return list(deltas.values())

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kept": None}  # a copy or a pickle builds its own


class _Kept:
    """A weight built once, and what it was built from.

    Versions tell of every in-place change but those made through `.data`; on the CPU, where it costs microseconds and no
    synchronisation, the small tensors are compared by value as well.
    """

    def __init__(self, values: list[Tensor], strengths: dict[str, float], weight: Tensor) -> None:
        self.values, self.strengths, self.weight = values, dict(strengths), weight
        self.marks = [_mark(value) for value in values]
        self.copies = [value.detach().clone() if value.device.type == "cpu" else None for value in values[1:]]

    def holds_for(self, values: list[Tensor], strengths: dict[str, float]) -> bool:
        return (
            self.strengths == strengths
            and len(self.values) == len(values)
            and all(old is new for old, new in zip(self.values, values, strict=True))
            and self.marks == [_mark(value) for value in values]
            and all(copy is None or torch.equal(copy, value) for copy, value in zip(self.copies, values[1:], strict=True))
        )


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    version = 0 if tensor.is_inference() else tensor._version
    return version, tensor.data_ptr(), tensor.dtype, tensor.device


class AdaptedLayer(nn.Module):
    """Mixed into the class of a layer that carries `WeightUpdates` as its child `loca`."""

    original_class: type[nn.Module]
    loca: WeightUpdates
    bias: Tensor | None

    @property
    def weight(self) -> Tensor:
        try:
            updated: Tensor = self.loca(base_weight(self))
        except AttributeError as error:  # which Python would answer by looking the name up elsewhere: with the base weight
            raise RuntimeError(f"the adapted weight cannot be built: {error}") from error
        return updated

    @weight.setter
    def weight(self, value: object) -> None:
        raise RuntimeError("the weight of an adapted layer is W + Delta W, to be read only: remove or merge its adapters first")

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        plain = self.original_class.forward is nn.Linear.forward and len(inputs) == 1 and not named
        if plain and self.loca.learns_alone(base_weight(self)):
            return self.loca.linear(inputs[0], base_weight(self), self.bias)
        result: Tensor = super().forward(*inputs, **named)
        return result

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty_adapted, (self.original_class,), self.__dict__.copy()


def base_weight(layer: nn.Module) -> Tensor:
    """W itself, whatever `layer.weight` reads as."""
    weight = layer._parameters.get("weight")
    if weight is None:
        raise RuntimeError(
            "the layer has no weight of its own any more: parametrize it before its adapters come, or not at all"
        )
    return weight


_adapted_classes: dict[type[nn.Module], type[nn.Module]] = {}


def adapted_class(original: type[nn.Module]) -> type[nn.Module]:
    """The one subclass of `original` whose weight is adapted."""
    if original not in _adapted_classes:
        attributes = {"original_class": original, "__module__": original.__module__, "__doc__": original.__doc__}
        _adapted_classes[original] = type(f"Adapted{original.__name__}", (AdaptedLayer, original), attributes)
    return _adapted_classes[original]


def _empty_adapted(original: type[nn.Module]) -> nn.Module:
    cls = adapted_class(original)
    return cls.__new__(cls)


def adapt(layer: nn.Module) -> WeightUpdates:
    """Make `layer` read its weight through its updates, and return them; a layer that does already stays as it is."""
    if isinstance(layer, AdaptedLayer):
        return layer.loca
    updates = WeightUpdates()
    layer.add_module("loca", updates)
    layer.__class__ = adapted_class(type(layer))
    return updates


def restore(layer: AdaptedLayer) -> None:
    """Give the layer its own class back; its parameters were never touched."""
    del layer._modules["loca"]
    layer.__class__ = layer.original_class  # type: ignore[assignment]
