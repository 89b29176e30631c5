"""The module and the rows of its weight that make up a projection: found in a model or, for pipelines, by names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loca_vision.functional.row_linear import Rows
from loca_vision.layers.attention_layouts import CLIP, DIFFUSERS, FUSED, T5, Naming, target_of
from loca_vision.layers.linear_layouts import FEED_FORWARD, features
from loca_vision.layers.targets import find_targets

_DENOISERS = ("unet", "transformer", "transformer_2", "controlnet", "prior", "decoder")


@dataclass(frozen=True)
class ProjectionRows:
    """The rows of a module's weight that make up one projection.

    Args:
        projection: its name in adapter files: `blocks.0.attn.q`, `unet.mid_block...attn1.q`.
        module: the layer whose weight has these rows: `blocks.0.attn.qkv`, `unet.mid_block...attn1.to_q`.
        rows: the rows of that weight; None for all.
        size: (p, q) of the whole weight; None if only names are known, in which case it is that of the projection.
    """

    projection: str
    module: str
    rows: Rows = None
    size: tuple[int, int] | None = None

    def taken(self, matrix: Tensor) -> Tensor:
        """Return the projection's rows of a matrix of the module's size."""
        return matrix if self.rows is None else matrix[self.rows]

    def count(self, rows: int) -> int:
        """Return the number of the projection's rows in a weight of `rows` rows."""
        return len(self.taken(torch.empty(rows, 0)))


def projections_in(model: nn.Module) -> list[ProjectionRows]:
    """Return every projection and linear layer of a model, adapted or not, in the order of its modules."""
    found = []
    for target in find_targets(model):
        size = features(target.layer)
        if size is not None and target.layer._parameters.get("weight") is not None:
            found.append(ProjectionRows(target.name, target.layer_path, target.rows, size))
    return found


def is_of_pipeline(name: str) -> bool:
    """Whether the name of a module or projection begins with a component of a pipeline."""
    return bool(_namings(name)) and "." in name


def projections_of_modules(modules: Iterable[str]) -> dict[str, ProjectionRows]:
    """Return the projections of modules in a pipeline's components, by module name; modules of other models are left out.

    A module that is not part of an attention or feed-forward layer is named by its own path.
    """
    return {module: ProjectionRows(_projection_of(module), module) for module in modules if is_of_pipeline(module)}


def rows_of_target(projection: str) -> ProjectionRows | None:
    """Return the module of a projection in a pipeline's component, by its name.

    Return None for any other name, and for parts of fused projections, whose rows cannot be derived from a name.
    """
    parent, _, part = projection.rpartition(".")
    if not is_of_pipeline(projection) or (part.partition("_")[0] in FUSED and target_of(part) in _FUSED_PARTS):
        return None
    for naming in _namings(projection):
        if part in _parts(naming, parent):
            return ProjectionRows(projection, f"{parent}.{_parts(naming, parent)[part]}")
    return ProjectionRows(projection, projection)


def _projection_of(module: str) -> str:
    for naming in _namings(module):
        for part, path in _ALL_PARTS.items() if naming is DIFFUSERS else naming.parts.items():
            if module.endswith(f".{path}"):
                return module[: -len(path)] + part
    return module


_FUSED_PARTS = ("q", "k", "v", "fc1")
_ALL_PARTS = {**DIFFUSERS.parts, **FEED_FORWARD}


def _namings(name: str) -> list[Naming]:
    component = name.partition(".")[0]
    if component in _DENOISERS:
        return [DIFFUSERS]
    if not re.fullmatch(r"(text|image)_encoder(_\d+)?", component):
        return []
    return [T5] if ".SelfAttention." in name else [CLIP]


def _parts(naming: Naming, parent: str) -> dict[str, str]:
    """Return the parts that a layer at the path `parent` may have; those of an MLP have the same names as its modules."""
    feed_forward = naming is DIFFUSERS and parent.rpartition(".")[2] != "mlp"
    return {**naming.parts, **(FEED_FORWARD if feed_forward else {})}
