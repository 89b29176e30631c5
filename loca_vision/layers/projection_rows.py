"""Which rows of which module's weight a projection is: of a model, or, for pipelines, by names alone."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loca_vision.checks import PARTS
from loca_vision.functional.row_linear import Rows
from loca_vision.layers.attention_layouts import CLIP, DIFFUSERS, T5, Naming
from loca_vision.layers.targets import find_targets

_DENOISERS = ("unet", "transformer", "transformer_2")


@dataclass(frozen=True)
class ProjectionRows:
    """
    Args:
        projection: as adapter files name it: `blocks.0.attn.q`, `unet.mid_block...attn1.q`.
        module: the layer whose weight it is rows of: `blocks.0.attn.qkv`, `unet.mid_block...attn1.to_q`.
        rows: of that weight; None for all.
        size: (p, q) of the whole weight; None where names are all that is known: it is the projection's then.
    """

    projection: str
    module: str
    rows: Rows = None
    size: tuple[int, int] | None = None

    def taken(self, matrix: Tensor) -> Tensor:
        """The projection's rows of a matrix of the module's size."""
        return matrix if self.rows is None else matrix[self.rows]

    def count(self, rows: int) -> int:
        """The number of its rows in a weight of `rows` rows."""
        return len(self.taken(torch.empty(rows, 0)))


def projections_in(model: nn.Module) -> list[ProjectionRows]:
    """Every projection of linear layers that a model has, adapted or not, in the order of its modules."""
    found = []
    for target in find_targets(model, PARTS):
        weight = target.layer._parameters.get("weight")
        if isinstance(target.layer, nn.Linear) and weight is not None:
            found.append(ProjectionRows(target.name, target.layer_path, target.rows, (weight.shape[0], weight.shape[1])))
    return found


def projections_of_modules(modules: Iterable[str]) -> dict[str, ProjectionRows]:
    """The projections among the modules of a pipeline's components, by module name; other modules are left out."""
    found = {}
    for module in modules:
        for naming in _namings(module):
            for part, path in _parts(naming).items():
                if module.endswith(f".{path}"):
                    found[module] = ProjectionRows(module[: -len(path)] + part, module)
    return found


def rows_of_target(projection: str) -> ProjectionRows | None:
    """The module that a projection of a pipeline's component is, by its name; None for any other name."""
    parent, _, part = projection.rpartition(".")
    for naming in _namings(projection):
        if part in _parts(naming) and parent:
            return ProjectionRows(projection, f"{parent}.{_parts(naming)[part]}")
    return None


def _namings(name: str) -> list[Naming]:
    component = name.partition(".")[0]
    if component in _DENOISERS:
        return [DIFFUSERS]
    if not re.fullmatch(r"text_encoder(_\d+)?", component):
        return []
    return [T5] if ".SelfAttention." in name else [CLIP]


def _parts(naming: Naming) -> dict[str, str]:
    """With the MLP's layers of CLIP, which are named alike on both sides."""
    return dict(naming.parts) | ({"fc1": "fc1", "fc2": "fc2"} if naming is CLIP else {})
