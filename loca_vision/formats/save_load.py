"""`save_adapter` and `load_adapter`. The whole file is checked before the model is touched."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loca_vision.formats.adapter_file import (
    FILE_NAME,
    METADATA_KEY,
    Description,
    as_json,
    check_values,
    part_of,
    read_description,
)
from loca_vision.formats.hub import may_be_a_repository
from loca_vision.formats.match_model import base_model_name, is_of_head, match, may_be_the_same
from loca_vision.formats.module_names import as_in_files, as_in_model, renamed, renamed_keys
from loca_vision.formats.packed.reading import can_be_packed, open_adapter
from loca_vision.formats.packed.writing import packed
from loca_vision.formats.sources import Request, locate
from loca_vision.functional.transforms import ordinary_tensors
from loca_vision.layers.called_layers import CalledConvolution
from loca_vision.layers.targets import Target, readable_weight
from loca_vision.methods.update import Update
from loca_vision.model.adapters import adapters
from loca_vision.model.inject import attach
from loca_vision.model.sharding import Values, one_writer
from loca_vision.model.state import Adapter, state_of
from loca_vision.model.target_checks import check_new_name
from loca_vision.model.traversal import own_tensors, sites, unwrap
from loca_vision.model.whole_tensors import whole_tensors
from loca_vision.offload import device_for
from loca_vision.storage.safetensors_file import PICKLES, pickle_hint, write_safetensors
from loca_vision.version import __version__

OwnTensors = Callable[[Mapping[str, Any]], dict[str, Any]]  # picks one model's tensors out of a file's, under the model's names


def save_adapter(
    model: nn.Module, path: str | os.PathLike[str], name: str = "default", *, dtype: torch.dtype = torch.float32
) -> Path:
    """Write one adapter, including tensors trained as a whole (such as a classifier head), to one safetensors file.

    Args:
        model: a model with the adapter. If it is sharded by `fully_shard`, all its processes call this; the first writes.
        path: a file name that ends in `.safetensors`, or a folder, in which the file is `pytorch_loca_weights.safetensors`.
            Missing folders are created. A crash leaves either the old file or the new one.
        name: the adapter's name.
        dtype: the dtype of the stored coefficients: float32, float16 or int8. In float16 and int8 the components of spectra
            are packed into about 3 and 2 bytes each instead of 8 (format version 2, which version 0.1.0 does not read). The
            error of the 8 bits is logged. Methods that are not packed do not support int8.

    Returns:
        The path of the file.

    Raises:
        ValueError: there is no such adapter, its method does not support the dtype, a value cannot be stored in a file, or the
            path is neither a `.safetensors` file name nor a folder.
        OSError: the file could not be written; an existing file is unchanged.
    """
    check_stored(dtype)
    file = _file_to_write(path)
    about, tensors = contents(model, name, dtype)
    with one_writer(unwrap(model)) as writes:
        if writes:
            write_adapter(file, about, tensors, dtype)
    return file


def load_adapter(
    model: nn.Module, path: str | os.PathLike[str], name: str | None = None, *, trainable: bool = True, head: bool = True
) -> tuple[str, ...]:
    """Load a saved adapter into a model at strength 1.0; the model is frozen as by `inject`, and locations are final.

    Args:
        model: a model built like the one the adapter was trained on, without an adapter of that name. Its head may have
            another number of classes: the adapter's own head replaces it while the adapter is active. The `conv_in` of a UNet
            may take fewer channels than the file's: it is widened, and `remove` restores the old one.
        path: the file, the folder that was given to `save_adapter`, or a repository on the hub, "user/name".
        name: the adapter's name in this model; by default the name it was saved under.
        trainable: whether its coefficients and its head can be trained further. If False, the whole model is frozen until
            the next `inject`, which trains only its own adapter.
        head: False skips the file's classifier head, for a model that has no head (`num_classes=0`, `features_only`) or keeps
            its own.

    Returns:
        The names of the adapted projections.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: the file cannot be read.
        ValueError: the file is not valid for this model; the error names file, key and rule. In every case the model is
            untouched.
    """
    with open_adapter(file_to_read(path)) as opened:
        about = read_description(opened.metadata, opened.entries)
        name = about.name if name is None else name
        model = unwrap(model)
        check_new_name(model, name)
        part, own = part_for_model(model, about, head=head)
        targets = match(model, part, own(opened.entries))
        tensors = opened.tensors()  # after the checks it is known to be no larger than the model, except for a wider conv_in
        check_values(tensors, about)
        adapter, placed = prepared(model, part, targets, own(tensors), learn=trainable)
    attach(model, name, adapter, placed, learn=trainable)
    return tuple(target.name for target in targets)


def part_for_model(model: nn.Module, about: Description, *, head: bool = True) -> tuple[Description, OwnTensors]:
    """Return the part of a file that is for a single model, under the model's names, and a function that picks its tensors.

    Args:
        head: whether to include a classifier head.

    Raises:
        ValueError: it is for another model, or for several components of a pipeline.
    """
    component = _only_component(about)
    if not component and not may_be_the_same(base_model_name(model), about.base_model):
        raise ValueError(f"it was trained on {about.base_model}; this model is {base_model_name(model)}")
    part = about.of(component)
    if not head:
        part = replace(part, whole=tuple(name for name in part.whole if not is_of_head(model, name)))
    return in_model(model, part, component)


def in_model(model: nn.Module, part: Description, component: str) -> tuple[Description, OwnTensors]:
    """Return a part of a file under the model's names, and a function that picks its tensors, or entries, out of the file's."""
    rename = as_in_model(model, part)
    return renamed(part, rename), lambda tensors: renamed_keys(part_of(tensors, component), part, rename)


def check_stored(dtype: torch.dtype) -> None:
    """Raise ValueError unless coefficients can be stored in that dtype."""
    if dtype not in (torch.float32, torch.float16, torch.int8):
        raise ValueError(f"dtype={dtype}: coefficients are stored as torch.float32, torch.float16 or torch.int8")


def contents(
    model: nn.Module, name: str, dtype: torch.dtype = torch.float32, state: Mapping[str, Tensor] | None = None
) -> tuple[Description, dict[str, Tensor]]:
    """Return the contents of an adapter's file, for a single model.

    Args:
        dtype: the dtype of the file. What will be packed into int8 stays in float32 until then.
        state: a state dict of the model, whose values are used instead of the model's. Without one, all processes that share a
            sharded model must call this together.

    Raises:
        ValueError: there is no such adapter, a value cannot be stored in a file, or the method does not support int8.
    """
    values = Values(unwrap(model), state)
    updates = {projection: values.of(update) for projection, update in adapters(model, name).items() if not update.inactive}
    whole = _whole_tensors(unwrap(model), name, values)
    config = state_of(model).adapters[name].config.for_updates(updates)  # type: ignore[union-attr]
    shapes = {projection: update.shape for projection, update in updates.items()}
    base, convolutions = base_model_name(unwrap(model)), _convolutions(unwrap(model), updates)
    about = Description({"": config}, shapes, tuple(sorted(whole)), name, base, __version__, convolutions)
    if dtype == torch.int8 and not can_be_packed(config):
        raise ValueError(f"dtype=torch.int8: {about.method} is stored as torch.float32 or torch.float16")
    held = config.to_tensors(updates, torch.float32 if dtype == torch.int8 else dtype)
    tensors = {f"full.{key}": value for key, value in whole.items()} | held
    rename = as_in_files(unwrap(model))
    return renamed(about, rename), renamed_keys(tensors, about, rename)


def write_adapter(file: Path, about: Description, tensors: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Check every value, then write the file.

    Args:
        tensors: the tensors in the layout of format version 1.
        dtype: in float32 the tensors are written as they are; in float16 and int8 they are packed where the method allows it,
            and in float16 written as they are otherwise.
    """
    check_values(tensors, about)
    metadata = {METADATA_KEY: json.dumps(as_json(about))}  # a single key, because the order of several would be random
    if dtype != torch.float32 and all(map(can_be_packed, about.configs.values())):
        with torch.device("cpu"):  # whatever default device the caller has set
            tensors, metadata = packed(about, tensors, dtype)
    write_safetensors(file, tensors, metadata)


def prepared(
    model: nn.Module,
    about: Description,
    targets: list[Target],
    tensors: dict[str, Tensor],
    room: int | None = None,
    *,
    learn: bool = True,
) -> tuple[Adapter, list[tuple[Target, Update]]]:
    """Make everything that `attach` will put into the model.

    Args:
        room: the number of components to make room for in every spectrum, so that another adapter can replace it later.
        learn: whether the updates are trainable; their locations are final.

    Raises:
        ValueError: a whole tensor overflows the model's dtype, or a spectrum has more components than there is room for.
    """
    with ordinary_tensors():
        tensors = {key: value.clone() if value.is_inference() else value for key, value in tensors.items()}
        whole = _in_their_dtypes(model, about, tensors)
        made = [about.configs[""].from_tensors(target.name, target.shape, tensors, room) for target in targets]
        for target in (target for target, update in zip(targets, made, strict=True) if update.needs_weight):
            readable_weight(target.layer, target.name)
        for parameter in (p for update in made for p in update.trainable()):
            parameter.requires_grad_(learn)
        placed = [(target, update.to(device_for(target.layer))) for target, update in zip(targets, made, strict=True)]
    return Adapter(about.configs[""], whole), placed


def _convolutions(model: nn.Module, projections: Collection[str]) -> frozenset[str]:
    """Return the adapted projections that are 1 x 1 convolutions."""
    hosts = [site for site in sites(model) if isinstance(site.host, CalledConvolution)]
    return frozenset(slot.projection for site in hosts for slot in site.updates.slots if slot.projection in projections)


def _whole_tensors(model: nn.Module, name: str, values: Values) -> dict[str, Tensor]:
    """Return the current values of the adapter's whole tensors, except integer ones such as counts of batches."""
    record = state_of(model)
    assert record is not None
    whole = {key: value for key, value in whole_tensors(model, record, name).items() if value.is_floating_point()}
    held = record.adapters[record.supplier].modules_to_save if record.supplier else {}
    whole = {key: values.at(key if held.get(key) is value else None, value) for key, value in whole.items()}
    return {key: value.cpu().clone().contiguous() for key, value in whole.items()}


def _file_to_write(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if file.suffix in PICKLES and not file.is_dir():
        raise ValueError(f"path={str(path)!r}: expected a file that ends in .safetensors, or a folder for one")
    return file if file.suffix == ".safetensors" and not file.is_dir() else file / FILE_NAME


def _only_component(about: Description) -> str:
    if len(about.configs) > 1:
        raise ValueError(
            f"it is for {', '.join(about.configs)} of a pipeline: use load_loca_weights(pipe, ...), whose spectra learn once "
            "they are told to with requires_grad_(True)"
        )
    return next(iter(about.configs))


def file_to_read(path: str | os.PathLike[str]) -> Path:
    """Return the file itself, the one in a folder, or, for a repository on the hub, the local copy of the one there."""
    file = Path(path)
    if isinstance(path, str) and not file.exists() and may_be_a_repository(path):
        return locate(path, Request())
    if not file.is_dir():
        return file
    if (file / FILE_NAME).exists():
        return file / FILE_NAME
    raise FileNotFoundError(f"{file}: there is no {FILE_NAME} in that folder{pickle_hint(p.name for p in file.iterdir())}")


def _in_their_dtypes(model: nn.Module, about: Description, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole tensors in the dtypes of the model's parameters."""
    own = own_tensors(model) if about.whole else {}
    return in_dtypes({name: own[name].dtype for name in about.whole}, tensors)


def in_dtypes(dtypes: Mapping[str, torch.dtype], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the whole tensors of these names from a file, converted to these dtypes.

    Raises:
        ValueError: a tensor overflows its dtype.
    """
    whole = {name: tensors[f"full.{name}"].to(dtype) for name, dtype in dtypes.items()}
    for name, value in whole.items():
        if not torch.isfinite(value).all():
            raise ValueError(f"full.{name} overflows {value.dtype}, the model's dtype")
    return whole
