"""`save_pretrained` of a model with adapters: the folder it writes includes the adapters, and the stock class can load it."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loca_vision.layers.targets import canonical
from loca_vision.model.conv_in import WEIGHT, conv_in_of_the_base
from loca_vision.model.state import state_of
from loca_vision.model.traversal import learns

Write = Callable[[Path], None]  # writes the files of a model's adapters into a folder
_ATTRIBUTE = "save_pretrained"
Prepare = Callable[[nn.Module, Mapping[str, Tensor] | None], Write]
_prepare: list[Prepare] = []


def written_by(prepare: Prepare) -> Prepare:
    """Register, as a decorator, the function that prepares the files of a model's adapters.

    It is in the package of file formats, which is above this one.
    """
    _prepare[:] = [prepare]
    return prepare


def keep_adapters_when_saved(model: nn.Module) -> None:
    """Replace the model's `save_pretrained`, if it has one, with `SavePretrained`."""
    if hasattr(model, _ATTRIBUTE) and _ATTRIBUTE not in model.__dict__:
        model.__dict__[_ATTRIBUTE] = SavePretrained(model)


def save_as_before(model: nn.Module) -> None:
    """Undo what `keep_adapters_when_saved` did."""
    if isinstance(model.__dict__.get(_ATTRIBUTE), SavePretrained):
        del model.__dict__[_ATTRIBUTE]


class SavePretrained:
    """The `save_pretrained` of a model with adapters.

    The adapters' files are written next to the model's file, so that `load_adapter(model, folder)` completes the model that
    `from_pretrained(folder)` returns. The model's file has the keys of the base. The exception is a model of transformers
    whose adapter is being trained: its file has all keys of `state_dict()` under their names there, because transformers'
    Trainer loads its checkpoints from it.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)  # the model has this as an attribute: a cycle would keep its memory alive

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._stock())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(self._stock()).bind(*args, **kwargs)
        given = call.arguments | call.arguments.get("kwargs", {})
        write = _prepare[0](self.model, given.get("state_dict"))  # this checks every value before anything is written
        call.arguments |= {"push_to_hub": False} if given.get("push_to_hub") else {}
        result = self._write_model(call)
        if given.get("is_main_process", True):
            write(Path(given["save_directory"]))
            if given.get("push_to_hub"):
                return self._push(given)
        return result

    @property
    def model(self) -> nn.Module:
        model = self._model()
        assert model is not None
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        return SavePretrained(memo.get(id(self.model), self.model))  # the model's copy, if this is copied along with the model

    def __reduce__(self) -> tuple[Any, ...]:
        return SavePretrained, (self.model,)

    def _stock(self) -> Any:
        cls: Any = type(self.model)
        return cls.save_pretrained.__get__(self.model)

    def _write_model(self, call: inspect.BoundArguments) -> Any:
        if _is_of_transformers(self.model) and learns(self.model):
            if "save_original_format" in call.signature.parameters:
                call.arguments.setdefault("save_original_format", False)  # its names are not those of `state_dict()`
            return self._stock()(*call.args, **call.kwargs)
        with _keys_of_the_base(self.model), conv_in_of_the_base(self.model):
            return self._stock()(*call.args, **call.kwargs)

    def _push(self, given: dict[str, Any]) -> Any:
        """Upload the folder here, because both libraries upload within `save_pretrained`, before the adapters' files exist."""
        push: Any = self.model.push_to_hub
        known = inspect.signature(push).parameters.keys() - {"repo_id"}
        return push(given.get("repo_id", Path(given["save_directory"]).name), **{k: given[k] for k in known & given.keys()})


def _is_of_transformers(model: nn.Module) -> bool:
    module = sys.modules.get("transformers.modeling_utils")  # if it is not imported, no model can be of transformers
    return module is not None and isinstance(model, module.PreTrainedModel)


@contextmanager
def _keys_of_the_base(model: nn.Module) -> Iterator[None]:
    """Make the model's `state_dict()` leave out adapters inside the context."""
    hook = model._register_state_dict_hook(without_adapters)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        hook.remove()


def without_adapters(model: nn.Module, state: dict[str, Any], prefix: str, local: Any) -> None:
    """Remove adapters from a state dict and restore the base's own tensors where an adapter trains them as a whole.

    Tensors of a fused adapter stay, because its updates are in the weights as well.
    """
    for key in [key for key in state if ".loca." in f".{key}"]:
        del state[key]
    record = state_of(model)
    if record is not None and not record.supplier_is_fused:
        narrow = {} if record.narrow is None else {WEIGHT: record.narrow.detach()}
        own = record.base | narrow
        state.update({key: own[canonical(key)].detach() for key in state if canonical(key) in own})
