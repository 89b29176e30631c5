"""The updates in an adapter file, for programs that add them to a pipeline's weights themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from loca_vision.formats.adapter_file import Description, check_values, part_of, read_description
from loca_vision.formats.lora_files.keys import canonical
from loca_vision.formats.packed.reading import open_adapter
from loca_vision.formats.save_load import file_to_read
from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.layers.projection_rows import rows_of_target
from loca_vision.methods.update import Update


@dataclass(frozen=True)
class FileUpdates:
    """The updates that a pipeline's adapter file holds, by the module whose weight they are added to; none is trainable.

    Args:
        updates: by module name as in diffusers and transformers, component first: `unet.mid_block...attn1.to_q`. An update of
            shape (p, q) is added to the module's weight, or to `weight.flatten(1)` of a 1 x 1 convolution.
        whole: tensors trained as a whole, which replace the base's, by parameter name: `unet.conv_in.weight`.
        name, base_model: the adapter's name and the model it was trained on.
    """

    updates: Mapping[str, Update]
    whole: Mapping[str, Tensor]
    name: str
    base_model: str


def read_updates(path: str | os.PathLike[str]) -> FileUpdates:
    """Read a pipeline's adapter, with every check of the file but without the pipeline.

    Args:
        path: an adapter file that `save_loca_weights` wrote, or the folder it is in.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a sound adapter file, is not for a pipeline, or does not say which weights it is for.
    """
    file = file_to_read(Path(path))
    with open_adapter(file) as opened, ordinary_tensors():
        about = read_description(opened.metadata, opened.entries)
        tensors = opened.tensors()
        check_values(tensors, about)
        if "" in about.configs:
            raise ValueError("it is of a model by itself, not of a pipeline's components: save it with save_loca_weights")
        return FileUpdates(_by_module(about, tensors), _whole(about, tensors), about.name, about.base_model)


def _by_module(about: Description, tensors: Mapping[str, Tensor]) -> dict[str, Update]:
    updates: dict[str, Update] = {}
    for component, config in about.configs.items():
        own = part_of(tensors, component)
        for projection, shape in about.of(component).shapes.items():
            place = rows_of_target(canonical(f"{component}.{projection}"))
            if place is None:
                raise ValueError(f"{component}.{projection}: which weight it is added to only the model tells")
            if place.module in updates:
                raise ValueError(
                    f"{component}.{projection}: it is another name of {place.module}, of which the file has an update"
                )
            updates[place.module] = config.from_tensors(projection, shape, own).requires_grad_(False)
    return updates


def _whole(about: Description, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    whole: dict[str, Tensor] = {}
    for name in about.whole:
        if canonical(name) in whole:
            raise ValueError(f"full.{name}: the file has it twice, under names of different versions of transformers")
        whole[canonical(name)] = tensors[f"full.{name}"]
    return whole
