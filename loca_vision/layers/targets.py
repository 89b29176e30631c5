"""Find the projections of a model that can be adapted by the model's structure, without importing timm or diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from loca_vision.functional.row_linear import Rows
from loca_vision.layers.attention_layouts import CALLED_BY_BLOCK, Naming, base_of, naming_of, target_of
from loca_vision.layers.attention_layouts import child as genuine_child
from loca_vision.layers.called_layouts import called_projections
from loca_vision.layers.linear_layouts import features, feed_forward, named_alike
from loca_vision.layers.model_walk import Place, places
from loca_vision.layers.plain_weight import as_matrix
from loca_vision.layers.timm_layouts import _attention, _mlp
from loca_vision.offload import stored


@dataclass(frozen=True)
class Target:
    """One projection: the rows of one linear layer that make up a part of an attention layer or an MLP.

    Args:
        name: the path of the attention layer or MLP, a dot, and the part, as in `blocks.0.attn.q`. A layer that does not follow
            this scheme has its own path as its name; rows of a layer that holds several projections have a name such as
            `fused_q` in the layer's place.
        part: "q", "k", "v", "out", "fc1", "fc2", "proj_in", "proj_out", "linear" for any other linear layer, or "conv" for a
            1 x 1 convolution.
        layer_path, layer: the module that holds the weight, and its path.
        rows: a slice or an int64 index of the weight's rows; None for all rows.
        attention: the attention layer if it is adapted as a whole (diffusers, transformers).
        called: True if the owner calls the layer, as in diffusers and transformers; False if it may read the weight instead.
    """

    name: str
    part: str
    layer_path: str
    layer: nn.Module
    rows: Rows = None
    attention: nn.Module | None = None
    called: bool = False

    @property
    def linear(self) -> bool:
        """Whether the layer is linear, quantised or not, and not a convolution."""
        return features(self.layer) is not None and not isinstance(self.layer, nn.Conv2d)

    @property
    def convolution(self) -> bool:
        """Whether the layer is a 1 x 1 convolution, whose weight is (p, q, 1, 1)."""
        return isinstance(self.layer, nn.Conv2d)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (p, q) of the projection. The layer must be linear or a 1 x 1 convolution."""
        sizes = features(self.layer)  # not the weight's shape, because it may be quantised or offloaded
        assert sizes is not None
        rows, cols = sizes
        if isinstance(self.rows, slice):
            return len(range(*self.rows.indices(rows))), cols
        return (rows if self.rows is None else len(self.rows)), cols

    def weight(self) -> Tensor:
        """Return these rows of the weight, (p, q), before any update, even if it is offloaded.

        Raises:
            ValueError: the weight is not a floating-point matrix, or has no values yet.
        """
        weight = readable_weight(self.layer, self.name).detach()
        if weight.device.type == "meta":
            raise ValueError(f"{self.name}: its weight has no values yet, which the adapter would start from")
        return weight if self.rows is None else weight[self.rows]


def readable_weight(layer: Any, name: str) -> Tensor:
    """Return the weight of a layer, inside any wrappers of peft, for updates that depend on it.

    Raises:
        ValueError: the weight is not a floating-point matrix.
    """
    layer = base_of(layer)
    weight = as_matrix(stored(layer, "weight") if "weight" in layer._parameters else None)
    if weight is None:
        raise ValueError(
            f"{name} is a {type(layer).__module__}.{type(layer).__name__}: its weight is not a plain floating-point matrix, "
            "on which the adapter depends"
        )
    return weight


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def canonical(path: str) -> str:
    """Return a module's or parameter's path as files name it, without wrappers for compilation, checkpointing and sharding."""
    return ".".join(name for name in path.split(".") if name not in _WRAPPERS)


def find_targets(model: nn.Module, parts: Sequence[str] | None = None) -> list[Target]:
    """Return every target of the wanted parts, linear or not, in the order of the model's modules.

    Args:
        model: the model to search.
        parts: as in `targets` of an `AdapterConfig`; None for every projection and linear layer of the model, including those
            that only a name pattern can select, such as 1 x 1 convolutions.

    Raises:
        ValueError: a fused projection whose rows do not divide into its parts.
    """
    attention_paths: list[str] = []
    found: list[Target] = []
    known: set[int] = set()
    outside: set[int] = set()
    order: dict[int, int] = {}  # the position of each module, by identity
    for place in places(model):
        order[id(place.module)] = len(order)
        outside |= _called_by_block(place.module)
        inside = [_outside(target) if id(target.layer) in outside else target for target in _of_module(place, attention_paths)]
        known |= {id(base_of(target.layer)) for target in inside}
        if id(place.module) not in known and place.path and features(place.module):
            part, path = "conv" if isinstance(place.module, nn.Conv2d) else "linear", canonical(place.path)
            inside.append(Target(path, part, path, place.module, called=place.called))
        found += [target for target in inside if parts is None or target.part in parts or _is_linear(target, parts)]
    return sorted(found, key=lambda target: order[id(target.attention or target.layer)])


def with_whole_layers(targets: Sequence[Target]) -> dict[str, Target]:
    """Return targets by name, and also called layers that hold several targets by their own paths.

    The latter allow a LoRA of the whole layer to be converted.
    """
    several = {target.layer_path: target for target in targets if target.called and target.rows is not None}
    whole = {path: replace(target, name=path, part="linear", rows=None) for path, target in several.items()}
    return whole | {target.name: target for target in targets}


def _called_by_block(block: nn.Module) -> set[int]:
    """Return the identities of layers inside an attention layer that the surrounding block calls."""
    attention, path = CALLED_BY_BLOCK.get(type(block).__name__, ("", ""))
    holder = block._modules.get(attention)
    return set() if holder is None else {id(base_of(genuine_child(holder, path)))}


def _outside(target: Target) -> Target:
    return replace(target, layer=base_of(target.layer), attention=None, called=True)


def _is_linear(target: Target, parts: Sequence[str]) -> bool:
    return "linear" in parts and target.linear


def _of_module(place: Place, attention_paths: list[str]) -> Iterator[Target]:
    """Yield the targets that are children of one module."""
    path, module = canonical(place.path), place.module
    naming = naming_of(module)
    if naming is not None:
        yield from _of_attention(path, module, naming)
        return
    where = f"{path}." if path else ""
    several = list(called_projections(module))
    for name, part, child, layer, rows in several:
        yield Target(f"{where}{name}", part, f"{where}{child}", layer, rows, called=place.called)
    if several:
        return
    if place.called:
        for part, child, layer in feed_forward(module):
            yield Target(f"{where}{part}", part, f"{where}{child}", base_of(layer), called=True)
    children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    attention = _attention(place.path, module, children)
    if attention:
        attention_paths.append(f"{place.path}.")
    mlp = _mlp(children, inside_attention=place.path.startswith(tuple(attention_paths)))
    for name, child, rows in (*attention, *mlp):
        yield Target(f"{where}{name}", target_of(name), f"{where}{child}", base_of(children[child]), rows, called=place.called)
    if place.called:
        for part, child, layer in named_alike(module, root=not place.path):
            yield Target(f"{where}{child}", part, f"{where}{child}", base_of(layer), called=True)


def _of_attention(path: str, attention: nn.Module, naming: Naming) -> Iterator[Target]:
    where = f"{path}." if path else ""
    for part in naming.present(attention):
        child_path = naming.parts[part]
        layer = genuine_child(attention, child_path)
        assert layer is not None
        yield Target(f"{where}{part}", target_of(part), f"{where}{child_path}", layer, attention=attention)
