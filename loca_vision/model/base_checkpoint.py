"""A `save_pretrained` that writes the base model without adapters."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

from torch import nn

from loca_vision.layers.targets import canonical
from loca_vision.model.conv_in import WEIGHT, conv_in_of_the_base
from loca_vision.model.state import state_of


class SaveBase:
    """`save_pretrained` of a model with adapters: the file has the keys of the base, and the stock class loads it."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # which has this as an attribute: no circle that would keep its memory

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._stock())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hook = self.model._register_state_dict_hook(without_adapters)  # type: ignore[no-untyped-call]
        try:
            with conv_in_of_the_base(self.model):
                return self._stock()(*args, **kwargs)
        finally:
            hook.remove()

    @property
    def model(self) -> nn.Module:
        model = self._model()
        assert model is not None
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> SaveBase:
        return SaveBase(memo.get(id(self.model), self.model))  # the copy of the model, which copies its attributes now

    def __reduce__(self) -> tuple[Any, ...]:
        return SaveBase, (self.model,)

    def _stock(self) -> Any:
        cls: Any = type(self.model)
        return cls.save_pretrained.__get__(self.model)


def without_adapters(model: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
    """Also without an adapter's whole tensors, unless its updates are in the weights too."""
    for key in [key for key in state if ".loca." in f".{key}"]:
        del state[key]
    record = state_of(model)
    if record is not None and not record.supplier_is_fused:
        narrow = {} if record.narrow is None else {WEIGHT: record.narrow.detach()}
        own = record.base | narrow
        state.update({key: own[canonical(key)].detach() for key in state if canonical(key) in own})
