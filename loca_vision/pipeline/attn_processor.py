"""LoCA as an attention processor, for code that sets processors by hand."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn

from loca_vision.layers.adapted_attention import AdaptedProjection
from loca_vision.layers.attention_layouts import DIFFUSERS, child, target_of
from loca_vision.layers.targets import Target
from loca_vision.layers.weight_updates import AdapterSlot, FusedUpdates, WeightUpdates
from loca_vision.methods.adapter_config import AdapterConfig
from loca_vision.methods.update import Update

_NAME = "default"


class LoCAAttnProcessor(nn.Module):
    """An attention processor that runs any other one on a view of the attention layer with adapted projections.

    `unet.set_attn_processor({path: LoCAAttnProcessor.of(attention, config), ...})` makes the spectra parameters of the UNet.
    `loca_vision.inject` needs no processor and is unaffected by later calls that set processors; this class is for code that
    manages its own.

    Args:
        processor: the processor to run, stock or custom; it is called with the same arguments.
        spectra: the update of each projection: "q", "k", "v", "out", and "add_q", "add_k", "add_v", "add_out" of joint
            attention.
        scale: multiplies the updates.

    Raises:
        ValueError: a projection is unknown, or there is none.
        TypeError: a value is not a processor, or not a spectrum.
    """

    def __init__(self, processor: Any, spectra: Mapping[str, Update], scale: float = 1.0) -> None:
        super().__init__()
        if not callable(processor):
            raise TypeError(f"processor is a {type(processor).__name__}: an attention processor is called")
        if not spectra:
            raise ValueError("spectra={}: name at least one projection")
        for part, update in spectra.items():
            if part not in DIFFUSERS.parts:
                raise ValueError(f"spectra: {part!r} is not one of {', '.join(DIFFUSERS.parts)}")
            if not isinstance(update, Update):
                raise TypeError(f"spectra[{part!r}] is a {type(update).__name__}: expected a Spectrum or another update")
        self.processor = processor
        self.scale = scale
        self.weights = nn.ModuleDict({f"on_{part}": _updates(part, update) for part, update in spectra.items()})
        self.__dict__["__call__"] = _Signature(self)

    @classmethod
    def of(cls, attention: nn.Module, config: AdapterConfig, processor: Any = None, *, name: str = "") -> LoCAAttnProcessor:
        """Return a processor with updates for the projections `config.targets` of a layer; at first it changes nothing.

        Args:
            attention: a `diffusers` attention layer.
            config: the settings of LoCA or another kind, with `n_components` as a single number.
            processor: the processor to wrap; by default the layer's.
            name: the name of the layer; with the seed, it determines the locations of the components.

        Raises:
            ValueError: counts are given by name, the settings do not fit the layer, or it lacks a projection.
        """
        counts = getattr(config, "n_components", 0)
        if isinstance(counts, Mapping):
            raise ValueError(f"n_components={counts!r}: expected one number for one layer")
        parts = [part for part in DIFFUSERS.present(attention) if target_of(part) in config.targets]
        if not parts:
            raise ValueError(f"targets={config.targets!r}: {type(attention).__name__} has no such projection")
        updates = dict(zip(parts, config.new_updates([_target(attention, part, name) for part in parts]), strict=True))
        return cls(attention.processor if processor is None else processor, updates)

    @property
    def spectra(self) -> dict[str, Update]:
        """The updates by projection."""
        return {name[3:]: updates.all_updates()[0] for name, updates in self._updates()}

    def __call__(self, attn: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for _, updates in self._updates():
            updates.strengths[_NAME] = self.scale
        return self.processor(_Seen(attn, self._projections(attn)), *args, **kwargs)

    def _updates(self) -> list[tuple[str, WeightUpdates]]:
        return list(self.weights.items())  # type: ignore[arg-type]

    def _projections(self, attn: Any) -> dict[str, Any]:
        found: dict[str, Any] = {
            path: _SeenProjection(attn, path, self.weights[f"on_{part}"])  # type: ignore[arg-type]
            for part, path in DIFFUSERS.parts.items()
            if f"on_{part}" in self.weights
        }
        for name, parts in DIFFUSERS.fused.items():
            if getattr(attn, name, None) is not None and any(f"on_{part}" in self.weights for part in parts):
                found[name] = _SeenProjection(attn, name, FusedUpdates(self._stack(attn, parts)))
        return found

    def _stack(self, attn: Any, parts: tuple[str, ...]) -> list[tuple[WeightUpdates, slice]]:
        stack, end = [], 0
        for part in parts:
            rows = _layer_at(attn, DIFFUSERS.parts[part]).out_features
            if f"on_{part}" in self.weights:
                stack.append((self.weights[f"on_{part}"], slice(end, end + rows)))
            end += rows
        return stack  # type: ignore[return-value]


def _target(attention: nn.Module, part: str, name: str) -> Target:
    path = DIFFUSERS.parts[part]
    layer: Any = child(attention, path)
    return Target(f"{name}.{part}" if name else part, target_of(part), path, layer, attention=attention)


def _updates(part: str, update: Update) -> WeightUpdates:
    updates = WeightUpdates()
    updates.add(AdapterSlot(_NAME, part, None), update)
    return updates


class _Signature:
    """`processor.__call__` as diffusers inspects it to see which arguments to pass on: with the inner processor's signature."""

    def __init__(self, owner: LoCAAttnProcessor) -> None:
        self._owner = weakref.ref(owner)  # weak: the owner has this as an attribute, and a cycle would keep its memory

    @property
    def owner(self) -> LoCAAttnProcessor:
        owner = self._owner()
        assert owner is not None
        return owner

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.owner.processor.__call__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Signature:
        return _Signature(memo.get(id(self.owner), self.owner))

    def __reduce__(self) -> tuple[Any, ...]:
        return _Signature, (self.owner,)


def _layer_at(attn: Any, path: str) -> Any:
    first, _, rest = path.partition(".")
    found = getattr(attn, first)
    return found[int(rest)] if rest else found


class _SeenProjection(AdaptedProjection):
    """An adapted projection of whatever attention layer, or view of one, the processor is called with."""

    def _layer(self) -> Any:
        return _layer_at(self.attention, self.path)

    def _prepare(self) -> None:
        """Do nothing: this object is created inside the traced code, and so is its update."""


class _Seen:
    """A view of an attention layer in which the adapted projections replace the originals."""

    def __init__(self, attention: Any, projections: dict[str, Any]) -> None:
        self.__dict__.update(_attention=attention, _projections=projections)

    def __getattr__(self, name: str) -> Any:
        if name in self._projections:
            return self._projections[name]
        genuine = getattr(self._attention, name)
        first = self._projections.get(f"{name}.0")
        return genuine if first is None else [first, *list(genuine)[1:]]

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._attention, name, value)
