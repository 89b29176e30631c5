"""The weights an adapter is for, by the names that updates have: of one model, or of a pipeline's components."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from loca_vision.formats.lora_tensors import COMPONENTS
from loca_vision.storage.sharded_weights import Weights, open_weights

BaseTensor = Callable[[str], Tensor]


@contextmanager
def open_base(path: str | os.PathLike[str], names: Iterable[str]) -> Iterator[BaseTensor]:
    """A function that reads a parameter of the base by its name, `unet.conv_in.weight`.

    Args:
        path: of the weights, as `open_weights` takes them; or the folder of a pipeline, with a folder for each component.
        names: of the parameters or modules that will be asked for.

    Raises:
        FileNotFoundError, ValueError: as `open_weights`; weights of one model, where several are asked for. The function
            raises ValueError where the base has no such parameter.
    """
    components = sorted({name.partition(".")[0] for name in names} & set(COMPONENTS)) or [""]
    with ExitStack() as stack:
        opened: dict[str, Weights] = {}
        for component in components:
            folder = Path(path) / component
            if len(components) > 1 and not folder.is_dir():
                raise ValueError(f"{path}: it has no folder {component}, and the adapter is for {', '.join(components)}")
            opened[component] = stack.enter_context(open_weights(folder if component and folder.is_dir() else path))
        yield lambda name: _tensor(name, opened, path)


def _tensor(name: str, opened: Mapping[str, Weights], path: str | os.PathLike[str]) -> Tensor:
    component = name.partition(".")[0]
    weights = opened.get(component, opened.get(""))
    own = name[len(component) + 1 :] if component in opened else name
    # Of a text encoder, files have text_model in their names or not.
    for found in (own, own.removeprefix("text_model."), f"text_model.{own}"):
        if weights is not None and found in weights.entries:
            return weights.tensor(found)
    raise ValueError(f"{path}: it has no tensor {own}, for which there is an update")
