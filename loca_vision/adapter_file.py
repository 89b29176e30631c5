"""The adapter file: one safetensors file whose header says what it is, and what must hold of it, whatever the model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from loca_vision.config import PARTS, LoCAConfig
from loca_vision.projections import kind_of
from loca_vision.safefile import Entry, strict_json

FILE_NAME = "pytorch_loca_weights.safetensors"
METADATA_KEY = "loca_adapter_metadata"
FORMAT_VERSION = 1
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FIELDS = {"format_version", "method", "name", "config", "shapes", "whole", "base_model", "library_version"}
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class Description:
    """What the header of an adapter file says.

    Args:
        configs: the adapter's settings by the component of a pipeline they are for, or under "" for a model by itself; where
            counts differ, `n_components` names each projection.
        shapes: (p, q) of each projection; of a pipeline's, the names begin with the component: `unet.mid_block...`.
        whole: names of the parameters trained whole beside them, with the component before them likewise.
        name, base_model, library_version: of the adapter, of what it was trained on, and of what wrote it.
    """

    configs: dict[str, LoCAConfig]
    shapes: dict[str, tuple[int, int]]
    whole: tuple[str, ...]
    name: str
    base_model: str
    library_version: str

    def config_for(self, projection: str) -> LoCAConfig:
        return self.configs[component_of(projection, self.configs)]

    def count(self, projection: str) -> int:
        """The components that `n_components` says this projection has."""
        component = component_of(projection, self.configs)
        counts = self.configs[component].n_components
        return counts if isinstance(counts, int) else counts[projection[len(prefix_of(component)) :]]

    def of(self, component: str) -> Description:
        """The part that one component of a pipeline has in it, as a description of that model by itself."""
        prefix = prefix_of(component)
        shapes = {name[len(prefix) :]: shape for name, shape in self.shapes.items() if name.startswith(prefix)}
        whole = tuple(name[len(prefix) :] for name in self.whole if name.startswith(prefix))
        return replace(self, configs={"": self.configs[component]}, shapes=shapes, whole=whole)


def joined(parts: Mapping[str, Description], base_model: str) -> Description:
    """One description of the parts of several components, which are of one adapter."""
    first = next(iter(parts.values()))
    return replace(
        first,
        configs={component: part.configs[""] for component, part in parts.items()},
        shapes={prefix_of(c) + name: shape for c, part in parts.items() for name, shape in part.shapes.items()},
        whole=tuple(prefix_of(c) + name for c, part in parts.items() for name in part.whole),
        base_model=base_model,
    )


def described(entries: Mapping[str, Entry], shapes: Mapping[str, tuple[int, int]]) -> Description:
    """What can be told of tensors that come without a header, given the shapes of a pipeline's projections by full name.

    Raises:
        ValueError: coefficients of a projection that is not among them.
    """
    names = [key.removesuffix(".coefficients") for key in entries if key.endswith(".coefficients")]
    if not names:
        raise ValueError("it is no LoCA adapter: no key ends in .coefficients")
    for name in names:
        if name not in shapes:
            raise ValueError(f"the pipeline has no projection {name}{nearest(name, shapes)}")
    counts: dict[str, dict[str, int]] = {}
    for name in names:
        component, _, projection = name.partition(".")
        counts.setdefault(component, {})[projection] = math.prod(entries[f"{name}.coefficients"].shape)
    parts = {c: tuple(p for p in PARTS if p in {kind_of(n.rpartition(".")[2]) for n in of}) for c, of in counts.items()}
    configs = {component: LoCAConfig(n_components=counts[component], targets=parts[component]) for component in counts}
    whole = tuple(sorted(key.removeprefix("full.") for key in entries if key.startswith("full.")))
    return Description(configs, {name: shapes[name] for name in names}, whole, "default", "unknown", "unknown")


def prefix_of(component: str) -> str:
    return f"{component}." if component else ""


def component_of(name: str, components: Collection[str]) -> str:
    """The component a projection or parameter belongs to.

    Raises:
        ValueError: none of them.
    """
    component = "" if "" in components else name.partition(".")[0]
    if component not in components:
        raise ValueError(f"{name} belongs to none of the components {', '.join(sorted(components))}")
    return component


def part_of(tensors: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The tensors (or entries) of one component, by the names they have in its model by itself."""
    if not component:
        return dict(tensors)
    found = {}
    for key, value in tensors.items():
        for start in ("full.", ""):
            if key.startswith(f"{start}{component}."):
                found[start + key[len(f"{start}{component}.") :]] = value
    return found


def with_prefix(tensors: Mapping[str, Tensor], component: str) -> dict[str, Tensor]:
    """The other way round."""
    prefix = prefix_of(component)
    return {f"full.{prefix}{key[5:]}" if key.startswith("full.") else f"{prefix}{key}": value for key, value in tensors.items()}


def as_json(about: Description) -> dict[str, Any]:
    """The metadata, from which `read_description` makes an equal description."""
    configs = {component: config.as_json() for component, config in about.configs.items()}
    fields = {key: value for key, value in vars(about).items() if key != "configs"}
    return {"format_version": FORMAT_VERSION, "method": "loca", "config": configs.get("", configs)} | fields


def read_description(metadata: dict[str, str], entries: dict[str, Entry]) -> Description:
    """Check header and metadata against each other, without a model.

    Raises:
        ValueError: naming the key and the rule.
    """
    if METADATA_KEY not in metadata:
        raise ValueError(f"it is no LoCA adapter: the header has no {METADATA_KEY}")
    fields = strict_json(metadata[METADATA_KEY])
    if not isinstance(fields, dict) or type(fields.get("format_version")) is not int:
        raise ValueError(f"{METADATA_KEY}: it is not an object with a format_version")
    if fields["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version={fields['format_version']}: this library reads version {FORMAT_VERSION}")
    if set(fields) != _FIELDS:
        raise ValueError(f"{METADATA_KEY}: the fields {sorted(set(fields) ^ _FIELDS)} are missing or unknown")
    if fields["method"] != "loca":
        raise ValueError(f"method={fields['method']!r}: this library reads 'loca'")
    for field in ("name", "base_model", "library_version"):
        if not isinstance(fields[field], str):
            raise ValueError(f"{field}={fields[field]!r}: it is a text")
    shapes, whole = _shapes(fields["shapes"]), _whole(fields["whole"])
    configs = _configs(fields["config"], shapes, whole)
    about = Description(configs, shapes, whole, fields["name"], fields["base_model"], fields["library_version"])
    _check_names(entries, shapes, whole)
    _check_components(entries, about)
    return about


def _shapes(fields: Any) -> dict[str, tuple[int, int]]:
    if not isinstance(fields, dict) or not fields:
        raise ValueError("shapes: it names no projection")
    for projection, shape in fields.items():
        whole = isinstance(shape, list) and len(shape) == 2 and all(type(n) is int and n > 0 for n in shape)
        if not whole or math.prod(shape) > 2**31:
            raise ValueError(f"shapes[{projection!r}]={shape!r}: two whole numbers from 1 up, with at most 2**31 cells")
    return {projection: tuple(shape) for projection, shape in fields.items()}


def _configs(fields: Any, shapes: dict[str, tuple[int, int]], whole: tuple[str, ...]) -> dict[str, LoCAConfig]:
    """One configuration for a model, or one for each component of a pipeline that the names begin with."""
    if not isinstance(fields, dict) or "n_components" in fields or not fields:
        return {"": _config(fields, list(shapes))}
    names: dict[str, list[str]] = {component: [] for component in fields}
    for name in shapes:
        component = component_of(name, names)
        names[component].append(name[len(component) + 1 :])
    for name in whole:
        component_of(name, names)
    for component, projections in names.items():
        if not component.isidentifier() or not projections:
            raise ValueError(f"config: {component!r} is no component that the file has projections for")
    return {component: _config(fields[component], names[component]) for component in fields}


def _config(fields: Any, projections: list[str]) -> LoCAConfig:
    known = LoCAConfig().as_json()
    if not isinstance(fields, dict) or set(fields) != set(known):
        raise ValueError(f"config: its fields are {', '.join(known)}, all of them and no others")
    config = LoCAConfig(**fields)
    counts = config.n_components
    if isinstance(counts, dict) and set(counts) != set(projections):
        raise ValueError("config: n_components does not name the projections of the file")
    return config


def _whole(fields: Any) -> tuple[str, ...]:
    texts = isinstance(fields, list) and all(isinstance(name, str) for name in fields)
    if not texts or len(set(fields)) < len(fields):
        raise ValueError(f"whole={fields!r}: a list of different parameter names")
    return tuple(fields)


def _check_names(entries: dict[str, Entry], shapes: dict[str, tuple[int, int]], whole: tuple[str, ...]) -> None:
    wanted = {f"{projection}.{kind}" for projection in shapes for kind in ("coefficients", "locations")}
    wanted |= {f"full.{name}" for name in whole}
    for key in sorted(wanted - set(entries)):
        raise ValueError(f"the tensor {key} is missing")
    for key in entries:
        if key not in wanted:
            raise ValueError(f"the tensor {key} is unknown{nearest(key, wanted)}")


def _check_components(entries: dict[str, Entry], about: Description) -> None:
    for projection, (rows, cols) in about.shapes.items():
        count = about.count(projection)
        if count > rows * cols:
            raise ValueError(f"{projection} has {count} components, of {rows} x {cols} = {rows * cols} cells")
        for kind, dtypes in (("coefficients", ("F32", "F16")), ("locations", ("I32",))):
            entry = entries[f"{projection}.{kind}"]
            if entry.dtype not in dtypes:
                raise ValueError(f"{projection}.{kind} has dtype {entry.dtype}: it is {' or '.join(dtypes)}")
            if entry.shape != (count,):
                raise ValueError(f"{projection}.{kind} has shape {entry.shape}: n_components says ({count},)")


def check_values(tensors: dict[str, Tensor], about: Description) -> None:
    """Finite numbers, also as an update, and locations inside their matrices.

    Raises:
        ValueError: naming the key and the rule.
    """
    for key, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ValueError(f"{key} holds NaN or infinity as {value.dtype}")
    for projection, (rows, cols) in about.shapes.items():
        scale = about.config_for(projection).scale
        size = abs(scale) * tensors[f"{projection}.coefficients"].double().abs().sum()
        if size > torch.finfo(torch.float32).max:
            raise ValueError(f"{projection}.coefficients times the scale {scale} overflows float32")
        flat = tensors[f"{projection}.locations"].long()
        if flat.min() < 0 or flat.max() >= rows * cols:
            bad = int(flat[(flat < 0) | (flat >= rows * cols)][0])
            raise ValueError(f"{projection}.locations holds {bad}: a {rows} x {cols} matrix has cells 0 to {rows * cols - 1}")


def nearest(name: str, names: Iterable[str]) -> str:
    """A hint; among names of ordinary length and number only, for comparing takes time."""
    close = difflib.get_close_matches(name[:200], [n for n in islice(names, 2000) if len(n) <= 200], n=2)
    return f"; near it are {', '.join(close)}" if close else ""
