"""An attention layer whose own code sees adapted projections, while all other code sees the original ones.

The layer's class is replaced by a subclass. Its `forward` runs the original `forward` on a view of the layer: an object that
shares all attributes with it, but whose class returns adapted projections for `to_q`, `to_k`, ... Processors and linear layers
are never replaced, so code that sets, wraps, fuses, offloads, casts or compiles them finds what it expects.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn

from loca_vision.layers.attention_layouts import Naming, child, naming_of
from loca_vision.layers.class_swap import Adapted, adapted_class, exchange_class
from loca_vision.layers.effective_weight import EffectiveWeight
from loca_vision.layers.plain_weight import is_plain_matrix
from loca_vision.layers.updated_call import UpdatedCall, is_hooked
from loca_vision.layers.weight_updates import FusedUpdates, WeightUpdates


class AttentionUpdates(nn.Module):
    """The updates of all projections of one attention layer, by part, and of layers that fuse several projections."""

    def __init__(self, attention: nn.Module, naming: Naming) -> None:
        super().__init__()
        self.naming = naming
        # The names have prefixes because peft targets every module whose path ends in a name it was given.
        self.weights = nn.ModuleDict({f"on_{part}": WeightUpdates() for part in naming.present(attention)})
        self.fused = nn.ModuleDict({f"in_{name}": FusedUpdates(self._stacked(attention, name)) for name in naming.fused})

    def part(self, part: str) -> WeightUpdates:
        updates: WeightUpdates = self.weights[f"on_{part}"]  # type: ignore[assignment]
        return updates

    def parts(self) -> Iterator[WeightUpdates]:
        yield from self.weights.values()  # type: ignore[misc]

    def effective_weights(self, attention: nn.Module) -> Iterator[tuple[str, EffectiveWeight]]:
        """Yield the path and the effective weight of every existing layer that provides one or several of the projections."""
        for part, path in self.naming.parts.items():
            if f"on_{part}" in self.weights:
                yield path, self.part(part)
        for name in self.naming.fused:
            if child(attention, name) is not None:
                yield name, self.fused[f"in_{name}"]  # type: ignore[misc]

    def stacked(self, attention: nn.Module, name: str) -> list[str]:
        """Return the paths of the layers whose weights the layer `name` stacks; empty if it stacks none."""
        paths = [self.naming.parts[part] for part in self.naming.fused.get(name, ())]
        return [path for path in paths if child(attention, path) is not None]

    def _stacked(self, attention: nn.Module, fused: str) -> list[tuple[WeightUpdates, slice]]:
        parts, end = [], 0
        for part in self.naming.fused[fused]:
            layer: Any = child(attention, self.naming.parts[part])
            if layer is not None:
                parts.append((self.part(part), slice(end, end + layer.out_features)))
                end += layer.out_features
        return parts


class AdaptedAttention(Adapted):
    """A mixin for the class of an attention layer that has `AttentionUpdates` as its child `loca`."""

    loca: AttentionUpdates

    @classmethod
    def members(cls, original: type[nn.Module]) -> dict[str, Any]:
        """Return a `forward` that computes with adapted projections."""
        run = original.forward  # looked up once here rather than at every call

        def forward(self: Any, *inputs: Any, **named: Any) -> Any:
            return run(self._loca_view, *inputs, **named)

        forward.__doc__, forward.__wrapped__ = run.__doc__, run  # type: ignore[attr-defined]
        return {"forward": forward}

    def _look(self, original: type[nn.Module]) -> None:
        """Create the view that `forward` runs on; it shares all attributes of the layer, including the view itself."""
        view = object.__new__(_view_class(original, self.loca.naming))
        object.__setattr__(view, "__dict__", self.__dict__)
        self.__dict__["_loca_projections"] = _projections(view)  # they refer to the view, never to the layer itself
        self.__dict__["_loca_view"] = view

    def __del__(self) -> None:
        """Break the reference cycle between the view and its attributes, so that the layer's memory is freed at once."""
        for name in ("_loca_view", "_loca_projections"):
            self.__dict__.pop(name, None)

    def kept_state(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_loca_view", "_loca_projections")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._look(self.original_class)


class AdaptedProjection(UpdatedCall):
    """A stand-in for a linear layer of an attention layer that adds its updates and otherwise behaves like the layer.

    It calls whatever layer is there at the time, even if other code has replaced or wrapped it.
    """

    def __init__(self, attention: nn.Module, path: str, effective_weight: EffectiveWeight) -> None:
        self.attention, self.path, self.effective_weight = attention, path, effective_weight

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self._called(x, *args, **kwargs)

    @property
    def weight(self) -> Tensor:
        """W + Delta W, for processors that read it."""
        weight: Tensor = self.effective_weight(self._layer().weight)
        return weight

    def __getattr__(self, name: str) -> Any:
        if name in ("attention", "path", "effective_weight") or name.startswith("__"):  # asked for during a copy
            raise AttributeError(name)
        return getattr(self._layer(), name)

    def _layer(self) -> Any:
        return child(self.attention, self.path)

    def _without_updates(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self._layer()(x, *args, **kwargs)
        return result

    def _is_plain(self, layer: Any) -> bool:
        return _is_plain(layer)

    def _may_keep(self, layer: Any, x: Tensor) -> bool:
        """Whether a matrix may be cached: not if the weight is on another device between calls, which means offloaded."""
        weight = getattr(layer, "weight", None)
        return not isinstance(weight, Tensor) or weight.device == x.device


def _is_plain(layer: Any) -> bool:
    return (
        isinstance(layer, nn.Module)
        and type(layer).forward is nn.Linear.forward
        and not is_hooked(layer)
        and is_plain_matrix(layer._parameters.get("weight"))
        and layer.weight.device.type != "meta"
    )


def _projections(view: Any) -> dict[str, Any]:
    """Return the adapted projection for each path of the layer; `to_out.0` is the first layer of a list."""
    loca: AttentionUpdates = view.__dict__["_modules"]["loca"]
    naming = loca.naming
    found = {
        path: AdaptedProjection(view, path, loca.part(part))
        for part, path in naming.parts.items()
        if f"on_{part}" in loca.weights
    }
    return found | {name: AdaptedProjection(view, name, loca.fused[f"in_{name}"]) for name in naming.fused}  # type: ignore[arg-type]


def _answer(name: str) -> property:
    def projection(view: Any) -> Any:
        genuine = view.__dict__["_modules"].get(name)
        if genuine is None:  # set to None, or missing
            return view.__dict__[name] if name in view.__dict__ else nn.Module.__getattr__(view, name)
        projections = view.__dict__["_loca_projections"]
        if name in projections:
            return projections[name]
        first = projections.get(f"{name}.0")
        return genuine if first is None else [first, *list(genuine)[1:]]

    return property(projection)


_view_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _view_class(original: type[nn.Module], naming: Naming) -> type[nn.Module]:
    if original not in _view_classes:
        names = {path.split(".")[0] for path in (*naming.parts.values(), *naming.fused)}
        body = {name: _answer(name) for name in sorted(names)} | {"__module__": original.__module__}
        _view_classes[original] = type(original.__name__, (original,), body)
    return _view_classes[original]


def adapt_attention(attention: nn.Module) -> AttentionUpdates:
    """Make the layer compute with its updates, and return them; a layer that already does so is left unchanged."""
    if isinstance(attention, AdaptedAttention):
        return attention.loca
    naming = naming_of(attention)
    assert naming is not None
    updates = AttentionUpdates(attention, naming)
    attention.add_module("loca", updates.train(attention.training))
    # Create the view first, because other threads may call the layer as soon as it has its new class.
    AdaptedAttention._look(cast(AdaptedAttention, attention), type(attention))
    exchange_class(attention, adapted_class(AdaptedAttention, type(attention)))
    return updates


def restore_attention(attention: AdaptedAttention) -> None:
    """Restore the layer's original class; its children were never touched."""
    del attention._modules["loca"]
    for name in ("_loca_view", "_loca_projections"):
        attention.__dict__.pop(name, None)
    exchange_class(attention, attention.original_class)
