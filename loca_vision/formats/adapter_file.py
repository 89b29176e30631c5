"""The adapter file: one safetensors file whose header describes it, and the rules it must obey for any model."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from loca_vision.checks import PARTS
from loca_vision.layers.attention_layouts import part_of_name
from loca_vision.messages import nearest
from loca_vision.methods.adapter_config import AdapterConfig, TensorSpec
from loca_vision.methods.loca import LoCAConfig
from loca_vision.methods.registry import KINDS
from loca_vision.storage.safetensors_file import Entry
from loca_vision.storage.strict_json import strict_json

FILE_NAME = "pytorch_loca_weights.safetensors"
METADATA_KEY = "loca_adapter_metadata"
FORMAT_VERSION = 1
FIELDS = {"format_version", "method", "name", "config", "shapes", "whole", "base_model", "library_version"}
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Description:
    """The contents of an adapter file's header.

    Args:
        configs: the adapter's settings for each component of a pipeline, or under "" for a single model; where counts differ,
            `n_components` names each projection.
        shapes: (p, q) of each projection. In a pipeline, names begin with the component: `unet.mid_block...`.
        whole: names of the parameters trained as a whole, prefixed with the component in the same way.
        name, base_model, library_version: the adapter's name, the model it was trained on, and the version that wrote the file.
        convolutions: the projections that are 1 x 1 convolutions, whose shape in the header is [p, q, 1, 1].
    """

    configs: dict[str, AdapterConfig]
    shapes: dict[str, tuple[int, int]]
    whole: tuple[str, ...]
    name: str
    base_model: str
    library_version: str
    convolutions: frozenset[str] = frozenset()

    @property
    def method(self) -> str:
        """The kind of adapter, the same for all components."""
        return next(iter(self.configs.values())).method

    def file_layout(self) -> dict[str, TensorSpec]:
        """Return what the file holds besides whole tensors, by key.

        Raises:
            ValueError: the settings do not fit the shapes.
        """
        found: dict[str, TensorSpec] = {}
        for component, config in self.configs.items():
            part = config.file_layout(self.of(component).shapes)
            found |= {prefix_of(component) + key: must for key, must in part.items()}
        return found

    def of(self, component: str) -> Description:
        """Return the part for one component of a pipeline, as the description of a single model."""
        prefix = prefix_of(component)
        shapes = {name[len(prefix) :]: shape for name, shape in self.shapes.items() if name.startswith(prefix)}
        whole = tuple(name[len(prefix) :] for name in self.whole if name.startswith(prefix))
        convolutions = frozenset(name[len(prefix) :] for name in self.convolutions if name.startswith(prefix))
        return replace(self, configs={"": self.configs[component]}, shapes=shapes, whole=whole, convolutions=convolutions)


def joined(parts: Mapping[str, Description], base_model: str) -> Description:
    """Join the descriptions of one adapter's parts in several components into one.

    Raises:
        ValueError: the parts are of different kinds.
    """
    first = next(iter(parts.values()))
    for component, part in parts.items():
        if part.method != first.method:
            raise ValueError(
                f"adapter {first.name!r} is {part.method} in {component} and {first.method} elsewhere: one kind a file"
            )
    return replace(
        first,
        configs={component: part.configs[""] for component, part in parts.items()},
        shapes={prefix_of(c) + name: shape for c, part in parts.items() for name, shape in part.shapes.items()},
        whole=tuple(prefix_of(c) + name for c, part in parts.items() for name in part.whole),
        convolutions=frozenset(prefix_of(c) + name for c, part in parts.items() for name in part.convolutions),
        base_model=base_model,
    )


def described(entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, int]]) -> Description:
    """Describe tensors that come without a header as far as possible.

    Args:
        shapes: (p, q) of the pipeline's projections by full name.

    Raises:
        ValueError: no key ends in `.coefficients`, or one belongs to a projection that is not in `shapes`.
    """
    names = [key.removesuffix(".coefficients") for key in entries if key.endswith(".coefficients")]
    if not names:
        raise ValueError("it is not a LoCA adapter: no key ends in .coefficients")
    for name in names:
        if name not in shapes:
            raise ValueError(f"the pipeline has no projection {name}{nearest(name, shapes)}")
    counts: dict[str, dict[str, int]] = {}
    for name in names:
        component, _, projection = name.partition(".")
        counts.setdefault(component, {})[projection] = math.prod(entries[f"{name}.coefficients"].shape)
    parts = {c: tuple(p for p in PARTS if p in {part_of_name(n) for n in of}) for c, of in counts.items()}
    configs: dict[str, AdapterConfig] = {c: LoCAConfig(n_components=counts[c], targets=parts[c]) for c in counts}
    whole = tuple(sorted(key.removeprefix("full.") for key in entries if key.startswith("full.")))
    return Description(configs, {name: shapes[name] for name in names}, whole, "default", "unknown", "unknown")


def prefix_of(component: str) -> str:
    return f"{component}." if component else ""


def component_of(name: str, components: Collection[str]) -> str:
    """Return the component a projection or parameter belongs to.

    Raises:
        ValueError: it belongs to none of them.
    """
    component = "" if "" in components else name.partition(".")[0]
    if component not in components:
        raise ValueError(f"{name} belongs to none of the components {', '.join(sorted(components))}")
    return component


def part_of(tensors: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Return the tensors (or entries) of one component, under the names they have in its model alone."""
    if not component:
        return dict(tensors)
    found = {}
    for key, value in tensors.items():
        for start in ("full.", ""):
            if key.startswith(f"{start}{component}."):
                found[start + key[len(f"{start}{component}.") :]] = value
    return found


def with_prefix(tensors: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """Prefix the names of one component's tensors with the component: the inverse of `part_of`."""
    prefix = prefix_of(component)
    return {f"full.{prefix}{key[5:]}" if key.startswith("full.") else f"{prefix}{key}": value for key, value in tensors.items()}


def as_json(about: Description) -> dict[str, Any]:
    """Return the metadata, from which `read_description` makes an equal description."""
    configs = {component: config.as_json() for component, config in about.configs.items()}
    shapes = {name: [*shape, 1, 1] if name in about.convolutions else shape for name, shape in about.shapes.items()}
    others = {key: value for key, value in vars(about).items() if key not in ("configs", "convolutions")} | {"shapes": shapes}
    return {"format_version": FORMAT_VERSION, "method": about.method, "config": configs.get("", configs)} | others


def read_description(metadata: dict[str, str], entries: dict[str, Entry]) -> Description:
    """Check header and metadata against each other, without a model, and return the description.

    Both are of version 1, or what `unpacked` makes of version 2.

    Raises:
        ValueError: they are unsound; the error names the key and the rule.
    """
    about = description_of(said_in(metadata))
    _check_tensors(entries, about)
    return about


def said_in(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the parsed metadata, of any format version.

    Raises:
        ValueError: it does not describe an adapter, or is not an object with a version.
    """
    if METADATA_KEY not in metadata:
        raise ValueError(f"it is not a LoCA adapter: the header has no {METADATA_KEY}")
    said = strict_json(metadata[METADATA_KEY])
    if not isinstance(said, dict) or type(said.get("format_version")) is not int:
        raise ValueError(f"{METADATA_KEY}: it is not an object with a format_version")
    return said


def description_of(said: Mapping[str, Any]) -> Description:
    """Return the description in metadata of version 1, without looking at the tensors.

    Raises:
        ValueError: a field is unsound; the error names the field and the rule.
    """
    if said["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version={said['format_version']}: this library reads versions 1 and 2")
    check_fields(said, FIELDS)
    if not isinstance(said["method"], str) or said["method"] not in KINDS:
        raise ValueError(
            f"method={said['method']!r}: this library reads {', '.join(map(repr, sorted(KINDS)))}; import the module that "
            "defines another, which --import does on a command line"
        )
    for field in ("name", "base_model", "library_version"):
        if not isinstance(said[field], str):
            raise ValueError(f"{field}={said[field]!r}: expected a text")
    (shapes, convolutions), whole = _shapes(said["shapes"]), _whole(said["whole"])
    configs = _configs(KINDS[said["method"]], said["config"], shapes, whole)
    return Description(configs, shapes, whole, said["name"], said["base_model"], said["library_version"], convolutions)


def check_fields(said: Mapping[str, Any], fields: Collection[str]) -> None:
    """Raise unless the metadata has these fields and no others."""
    if set(said) != set(fields):
        raise ValueError(f"{METADATA_KEY}: the fields {sorted(set(said) ^ set(fields))} are missing or unknown")


def _shapes(fields: Any) -> tuple[dict[str, tuple[int, int]], frozenset[str]]:
    """Return (p, q) of each projection, and which of them are 1 x 1 convolutions."""
    if not isinstance(fields, dict) or not fields:
        raise ValueError("shapes: it names no projection")
    for projection, shape in fields.items():
        sizes = isinstance(shape, list) and (len(shape) == 2 or shape[2:] == [1, 1])
        if not sizes or not all(type(n) is int and n > 0 for n in shape) or math.prod(shape) > 2**31:
            raise ValueError(
                f"shapes[{projection!r}]={shape!r}: two whole numbers from 1 up, with at most 2**31 cells; "
                "for a convolution [p, q, 1, 1]"
            )
    convolutions = frozenset(projection for projection, shape in fields.items() if len(shape) == 4)
    return {projection: (shape[0], shape[1]) for projection, shape in fields.items()}, convolutions


def _configs(
    kind: type[AdapterConfig], said: Any, shapes: dict[str, tuple[int, int]], whole: tuple[str, ...]
) -> dict[str, AdapterConfig]:
    """Return one configuration for a single model, or one for each component of a pipeline that the names begin with."""
    if not isinstance(said, dict) or "targets" in said or not said:
        return {"": _config(kind, said, list(shapes))}
    names: dict[str, list[str]] = {component: [] for component in said}
    for name in shapes:
        component = component_of(name, names)
        names[component].append(name[len(component) + 1 :])
    for name in whole:
        component_of(name, names)
    for component, projections in names.items():
        if not component.isidentifier() or not projections:
            raise ValueError(f"config: {component!r} is not a component that the file has projections for")
    return {component: _config(kind, said[component], names[component]) for component in said}


def _config(kind: type[AdapterConfig], said: Any, projections: list[str]) -> AdapterConfig:
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not isinstance(said, dict) or not {*known} - {"layers"} <= {*said} <= {*known}:  # `as_json` says why not `layers`
        raise ValueError(f"config: its fields are {', '.join(known)}, all of them and no others")
    config = kind(**said)
    config.check_names(projections)
    return config


def _whole(fields: Any) -> tuple[str, ...]:
    texts = isinstance(fields, list) and all(isinstance(name, str) for name in fields)
    if not texts or len(set(fields)) < len(fields):
        raise ValueError(f"whole={fields!r}: a list of different parameter names")
    return tuple(fields)


def _check_tensors(entries: dict[str, Entry], about: Description) -> None:
    layout = about.file_layout()
    wanted = {*layout, *(f"full.{name}" for name in about.whole)}
    for key in sorted(wanted - set(entries)):
        raise ValueError(f"the tensor {key} is missing")
    for key in entries:
        if key not in wanted:
            raise ValueError(f"the tensor {key} is unknown{nearest(key, wanted)}")
    for key, must in layout.items():
        if entries[key].dtype not in must.dtypes:
            raise ValueError(f"{key} has dtype {entries[key].dtype}: expected {' or '.join(must.dtypes)}")
        if entries[key].shape != must.shape:
            raise ValueError(f"{key} has shape {entries[key].shape}: by the settings it is {must.shape}")


def check_values(tensors: dict[str, Tensor], about: Description) -> None:
    """Check that all numbers are finite, also as an update, and that locations lie inside their matrices.

    Raises:
        ValueError: a value breaks a rule; the error names the key and the rule.
    """
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{key} holds NaN or infinity as {value.dtype}")
    for key, must in about.file_layout().items():
        if must.cells_of is not None:
            _check_cells(key, tensors[key], must.cells_of)
    for projection, shape in about.shapes.items():
        about.configs[component_of(projection, about.configs)].check_values(projection, shape, tensors)


def _check_cells(key: str, flat: Tensor, matrix: tuple[int, int]) -> None:
    rows, cols = matrix
    least, most = flat.aminmax() if len(flat) else (0, 0)
    for value in (int(least), int(most)):
        if not 0 <= value < rows * cols:
            raise ValueError(f"{key} holds {value}: a {rows} x {cols} matrix has cells 0 to {rows * cols - 1}")
