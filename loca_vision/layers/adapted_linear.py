"""A linear layer whose `weight` reads as W + Delta W.

The layer's class is replaced by a subclass with a `weight` property. The parameter W stays where it is, so the keys of the
`state_dict` do not change. Code that bypasses `forward`, such as `F.linear(x, layer.weight)` in BEiT, EVA and Swin V2, is
adapted as well.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from loca_vision.functional.transforms import compiled
from loca_vision.layers.class_swap import Adapted, adapted_class, exchange_class, once_while_traced
from loca_vision.layers.mixed_call import may_mix, with_updates_of_call
from loca_vision.layers.mixed_weight import mixed_weight
from loca_vision.layers.plain_weight import is_plain_matrix
from loca_vision.layers.targets import readable_weight
from loca_vision.layers.weight_updates import WeightUpdates


class AdaptedLayer(Adapted):
    """A mixin for the class of a layer that has `WeightUpdates` as its child `loca`."""

    loca: WeightUpdates
    bias: Tensor | None


class ReadLayer(AdaptedLayer):
    """A linear layer whose weight is, or may be, read by other code."""

    @property
    def weight(self) -> Tensor:
        try:
            if not is_plain_matrix(base_weight(self)):
                return base_weight(self)  # quantised: the layer's forward reads it, and the updates act on activations
            if may_mix(self.loca):
                return mixed_weight(base_weight(self), self.loca)
            if compiled():
                if self.loca.learns():
                    self.loca.drop()
                else:
                    self._settle()
            updated: Tensor = self.loca(base_weight(self))
        except AttributeError as error:  # Python would fall back to nn.Module's lookup, which finds the base weight
            raise RuntimeError(f"the adapted weight cannot be built: {error}") from error
        return updated

    @weight.setter
    def weight(self, value: object) -> None:
        raise RuntimeError(
            "the weight of an adapted layer is W + Delta W, to be read only: remove or merge its adapters first (to share the "
            "model out over processes, use fully_shard in the place of FullyShardedDataParallel)"
        )

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        plain = is_plain_matrix(base_weight(self))
        stock = self.original_class.forward is nn.Linear.forward and len(inputs) == 1 and not named
        if may_mix(self.loca) and (stock or not plain):
            mixed = F.linear(inputs[0], base_weight(self), self.bias) if plain else super().forward(*inputs, **named)
            return with_updates_of_call(self.loca, inputs[0], mixed, lambda: readable_weight(self, "the layer"), in_place=plain)
        learned = self.loca.learned_linear(inputs[0], base_weight(self), self.bias) if plain and stock else None
        if learned is not None:
            return learned
        result: Tensor = super().forward(*inputs, **named)
        return result if plain else result + self._term(inputs[0], result.shape[-1]).to(result.dtype)

    def _term(self, x: Tensor, rows: int) -> Tensor:
        """Return what the updates add to the output of a quantised layer."""
        return self.loca.applied(x, rows, keep=True, base=lambda: readable_weight(self, "the layer"))

    @once_while_traced
    def _settle(self) -> None:
        self.loca.settle(base_weight(self))


def base_weight(layer: nn.Module) -> Tensor:
    """Return W itself, whatever `layer.weight` reads as."""
    weight = layer._parameters.get("weight")
    if weight is None:
        raise RuntimeError(
            "the layer has no weight of its own any more: parametrize it before its adapters come, or not at all"
        )
    return weight


def adapt(layer: nn.Module, mixin: type[AdaptedLayer] = ReadLayer) -> WeightUpdates:
    """Make `layer` compute with its updates, and return them; a layer that already does so is left unchanged."""
    if isinstance(layer, AdaptedLayer):
        return layer.loca
    updates = WeightUpdates()
    layer.add_module("loca", updates.train(layer.training))
    exchange_class(layer, adapted_class(mixin, type(layer)))
    return updates


def restore(layer: AdaptedLayer) -> None:
    """Restore the layer's original class; its parameters were never touched."""
    del layer._modules["loca"]
    exchange_class(layer, layer.original_class)
