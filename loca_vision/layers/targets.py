"""The projections of a model that can be adapted, found by structure without importing timm or diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from loca_vision.functional.row_linear import Rows
from loca_vision.layers.attention_layouts import Naming, base_of, naming_of, target_of
from loca_vision.layers.attention_layouts import child as genuine_child
from loca_vision.layers.plain_weight import is_plain_matrix
from loca_vision.layers.timm_layouts import _attention, _mlp
from loca_vision.offload import stored


@dataclass(frozen=True)
class Target:
    """One projection: the rows of one linear layer that make up a part of an attention layer or an MLP.

    Args:
        name: path of the attention layer or MLP, a dot, and the part: `blocks.0.attn.q`.
        part: "q", "k", "v", "out", "fc1" or "fc2".
        layer_path, layer: the module that holds the weight.
        rows: a slice or an index (int64) of the weight's rows; None for all of them.
        attention: the attention layer, where it is adapted as a whole (diffusers, transformers).
    """

    name: str
    part: str
    layer_path: str
    layer: nn.Module
    rows: Rows = None
    attention: nn.Module | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(p, q) of the projection. The layer must be linear."""
        rows: Any = self.layer.out_features  # the weight may be quantised, or offloaded
        cols: Any = self.layer.in_features
        if isinstance(self.rows, slice):
            return len(range(*self.rows.indices(rows))), cols
        return (rows if self.rows is None else len(self.rows)), cols

    def weight(self) -> Tensor:
        """(p, q), these rows of the weight before any update, wherever it is kept.

        Raises:
            ValueError: it is not a matrix of floating-point numbers, or has none yet.
        """
        weight = readable_weight(self.layer, self.name).detach()
        if weight.device.type == "meta":
            raise ValueError(f"{self.name}: its weight has no values yet, which the adapter would start from")
        return weight if self.rows is None else weight[self.rows]


def readable_weight(layer: Any, name: str) -> Tensor:
    """The weight of a layer, past the wrappers that peft puts around it, for those updates that depend on it.

    Raises:
        ValueError: it is not a matrix of floating-point numbers.
    """
    layer = base_of(layer)
    weight: Any = stored(layer, "weight") if "weight" in layer._parameters else None
    if not is_plain_matrix(weight):
        raise ValueError(
            f"{name} is a {type(layer).__module__}.{type(layer).__name__}: its weight is not a plain floating-point matrix, "
            "on which the adapter depends"
        )
    return weight  # type: ignore[no-any-return]


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical(path: str) -> str:
    """A module's or parameter's path without the wrappers of compilation, checkpointing and sharding, as files name it."""
    return ".".join(name for name in path.split(".") if name not in _WRAPPERS)


def find_targets(model: nn.Module, parts: Sequence[str]) -> Iterator[Target]:
    """Every target of the wanted parts, in the order of the model's modules, linear or not.

    Raises:
        ValueError: a fused projection whose rows do not divide into its parts.
    """
    attention_paths: list[str] = []
    for path, module in model.named_modules():
        naming = naming_of(module)
        if naming is not None:
            yield from _of_attention(canonical(path), module, naming, parts)
            continue
        children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Identity)}
        attention = _attention(path, module, children)
        if attention:
            attention_paths.append(f"{path}.")
        mlp = _mlp(children, inside_attention=path.startswith(tuple(attention_paths)))
        for part, child, rows in (*attention, *mlp):
            if target_of(part) in parts:
                where = f"{canonical(path)}." if canonical(path) else ""
                yield Target(f"{where}{part}", target_of(part), f"{where}{child}", children[child], rows)


def _of_attention(path: str, attention: nn.Module, naming: Naming, parts: Sequence[str]) -> Iterator[Target]:
    where = f"{path}." if path else ""
    for part in naming.present(attention):
        if target_of(part) in parts:
            child_path = naming.parts[part]
            layer = genuine_child(attention, child_path)
            assert layer is not None
            yield Target(f"{where}{part}", target_of(part), f"{where}{child_path}", layer, attention=attention)
